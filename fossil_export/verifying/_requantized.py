"""Weights level of a merge that kept the base's quantization: is what is stored the merged weight, quantized once?

Stored tensors that no change touches must be the base's bytes. A weight that changes is rebuilt in float64; what the
merge had of it in float32 is within `reach` of that. It is quantized here from the exact values and from others within
that reach (`nearby`), and the artifact must have what one of them gives:

- scales, zeros and other parameters lie between those of the nearby values (encoders are monotone in what they measure:
  only a tie in their rounding can be between);
- of codes on the artifact's own parameters, the artifact's is the nearest to a value within reach: no further from it
  than the code of the exact value, which is on the same parameters. So it is for the exact value, or for an end of the
  reach, as the encoder rounds that to 16 bits first (`rounds_to`), or not; or else it is the code of a nearby value.

What this costs for all values: one encoding, if parameters have no ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._coding import BLOCK, CodedRows
from fossil_export.checkpoints._dtypes import BITS, element_count, stored_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints._source import by_path
from fossil_export.merging._change import Part, parts_of
from fossil_export.merging._placement import Places
from fossil_export.merging._requantize import part_of, ranges
from fossil_export.verifying._comparison import addend
from fossil_export.verifying._files import Files
from fossil_export.verifying._job import Job
from fossil_export.verifying._nearby import Points, blocks, is_text, nearby, outside, reach_of, says, wide
from fossil_export.verifying._rebuilding import rebuild
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck, check_tensors, places_of

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]


def check_requantized(
    artifact: Checkpoint, base: Checkpoint, added: Sum, progress: Callable[[int], None] = lambda nbytes: None
) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
    """Every stored tensor of a quantized `artifact`, and what is wrong with it as a whole: another format, say, with
    which nothing can be compared."""
    assert artifact.quantized is not None
    if base.quantized is None:
        return None, [f"is quantized ({artifact.quantized.format}), and the base {base.location} is not"]
    kinds = [one.quantized.format for one in (artifact, base) if one.quantized is not None]
    if kinds[0] != kinds[1]:
        return None, [f"is quantized as {kinds[0]}, and the base as {kinds[1]}"]
    problems = []
    if artifact.quantized.settings != base.quantized.settings:
        problems.append("config.json has other settings of the quantization than the base's")
    places = places_of(added, base)
    touched = {*places.changes, *places.sources, *(name for name, pieces in places.pieces.items() if pieces)}
    weights = {
        info.name: one.name for one in base.tensors.values() if one.coding is not None for info in one.coding.stored
    }
    ours, theirs = base.quantized.stored, artifact.quantized.stored
    known: dict[str, TensorCheck] = {}
    for stored, weight in weights.items():
        if weight in touched and weight not in known and (wrong := _unlike(stored, ours, theirs)):
            known[weight] = TensorCheck(weight, "requantize", worst=float("inf"), problem=wrong)
    for name, one in base.tensors.items():
        if one.coding is None or name not in touched or name in known:
            continue
        found = artifact.tensors.get(name)
        if found is None or found.coding is None or (found.shape, found.dtype) != (one.shape, one.dtype):
            known[name] = TensorCheck(name, "requantize", worst=float("inf"), problem="is quantized in another way")
    adapters = ((one.home, one.headers) for one in added.adapters)
    headers = by_path((theirs.home, theirs.files), (ours.home, ours.files), *adapters)
    with Files(headers) as files:
        for name, one in base.tensors.items():
            if one.coding is not None and name in touched and name not in known:
                known[name] = _Weight(one, artifact.tensors[name], places, added, files).check()
                progress(sum(info.nbytes for info in one.coding.stored))
        files.check()
    passed = {stored: known[weight] for stored, weight in weights.items() if weight in known}
    tensors = check_tensors(theirs, ours, added, places, "auto", progress, passed)
    return tuple(dict.fromkeys(tensors)), problems


def _unlike(name: str, ours: Checkpoint, theirs: Checkpoint) -> str | None:
    """What is wrong with a stored tensor before its values are looked at."""
    want, found = ours.tensors[name], theirs.tensors.get(name)
    if found is None:
        return f"has no {name} in the artifact"
    if (want.dtype, want.shape) != (found.dtype, found.shape):
        return f"has {name} {found.dtype} {list(found.shape)}, should be {want.dtype} {list(want.shape)}"
    return None


class _Weight:
    """A quantized weight that changes: `own` of the base, `found` in the artifact."""

    def __init__(self, own: TensorInfo, found: TensorInfo, places: Places, added: Sum, files: Files) -> None:
        self._own, self._found, self._added, self._files = own, found, added, files
        self._changes = places.changes.get(own.name, ())
        self._source, self._owner = places.sources.get(own.name, (own, None))
        self._parts = tuple(parts_of(own.shape, self._changes, places.pieces.get(own.name, ())))
        self._brought = self._owner is not None or bool(places.pieces.get(own.name))
        self._wrong = 0
        self._first = -1
        self._beside: str | None = None
        self._kept = self._update = 0.0

    def check(self) -> TensorCheck:
        coding = self._own.coding
        assert coding is not None
        for start, stop in ranges(self._own, self._parts):
            self._range(start, stop, coding.width)
        problem = self._beside
        if self._wrong:
            where = divmod(self._first, coding.width)
            problem = (
                f"{self._wrong} of {element_count(self._own.shape)} values are not the merged ones quantized once, the "
                f"first at {list(where)}"
            )
        modules = {change.trained.module for change in self._changes}
        return TensorCheck(
            self._own.name,
            "requantize",
            module=modules.pop() if len(modules) == 1 else None,
            elements=element_count(self._own.shape),
            worst=float("inf") if problem else 0.0,
            off=self._wrong,
            kept=self._kept,
            update=self._update,
            problem=problem,
        )

    def _range(self, start: int, stop: int, width: int) -> None:
        """Rows [start, stop) of the coded matrix, which are quantized by themselves."""
        import numpy as np

        exact, reach = (one.reshape(-1, width) for one in self._exact(start * width, stop * width))
        if not np.isfinite(exact).all():
            self._beside = "is not finite as the adapter has it"
            return
        own, found = part_of(self._own, start, stop), part_of(self._found, start, stop)
        assert own.coding is not None and found.coding is not None
        encoder: Any = own.coding
        encoder = encoder.encoder(self._files.codes) if hasattr(encoder, "encoder") else encoder
        stored = {info.name: _whole(info, self._files.codes) for info in found.coding.stored}
        codes, *beside = found.coding.stored
        flat = replace(_wide(found), shape=exact.shape)

        def rows_with(other: Array) -> CodedRows:
            return CodedRows(flat, _reader(found, {**stored, codes.name: other}), 0, len(exact))

        after = rows_with(stored[codes.name])
        mine = encoder.encode(exact)
        ties = not all(_same(mine[info.name], stored[info.name]) for info in beside)
        off = np.empty(0, np.intp)
        if ties or not _same(mine[codes.name], stored[codes.name]):
            off = _differing(after, rows_with(mine[codes.name]))
        if len(off) or ties:
            points = Points(flat, off, exact, reach, getattr(own.coding, "rounds_to", None))
            values = _at(after, off)
            given = [_at(rows_with(mine[codes.name]), off)]
            wrong = np.ones(len(off), bool)
            if points.fine:
                wrong &= ~points.nearest(values, given)
            if wrong.any() or ties:
                texts = {info.name: [mine[info.name]] for info in beside if is_text(info, stored[info.name])}
                low = {info.name: wide(mine[info.name]) for info in beside if info.name not in texts}
                high = dict(low)
                for other in nearby(exact, reach):
                    theirs = encoder.encode(other)
                    given.append(_at(rows_with(theirs[codes.name]), off))
                    wrong &= given[-1] != values
                    for name in texts:
                        texts[name].append(theirs[name])
                    for name in low:
                        low[name] = np.minimum(low[name], wide(theirs[name]))
                        high[name] = np.maximum(high[name], wide(theirs[name]))
                    if not ties and not wrong.any():
                        break
                if ties:
                    wrong &= ~points.nearest(values, given)
                    told = [outside(name, stored[name], low[name], high[name]) for name in low]
                    told += [f"has another {name}" for name in texts if not says(stored[name], texts[name])]
                    self._beside = self._beside or next(filter(None, told), None)
            if count := int(np.count_nonzero(wrong)):
                if not self._wrong:
                    self._first = start * width + int(off[int(wrong.argmax())])
                self._wrong += count
        if not self._brought:
            before = CodedRows(replace(own, shape=exact.shape), self._files.codes, 0, len(exact))
            for some in blocks(exact.shape):
                was = before[some].astype(np.float64)
                update = exact[some] - was
                self._update += float(np.einsum("ij,ij->", update, update))
                self._kept += float(np.einsum("ij,ij->", after[some] - was, update))

    def _exact(self, first: int, last: int) -> tuple[Array, Array]:
        """Elements [first, last), computed in float64 and rounded to float32, and how far from them those of the merge
        may be."""
        import numpy as np

        exact, reach = np.empty(last - first, np.float32), np.zeros(last - first, np.float32)
        for part in self._parts:
            if part.last <= first or part.first >= last:
                continue
            job = Job(self._own.name, self._found, self._source, part, "requantize", self._owner)
            rows_of = self._files.rows(self._added.adapters[job.reader])
            if not part.changes:
                self._unchanged(part, job, rows_of, exact, first, last)
                continue
            assert first <= part.first and part.last <= last
            for start, stop in job.slabs():
                weight = np.asarray(part.matrix_rows(rows_of, start, stop)[:], np.float64)
                adapters = self._added.adapters
                needed = [addend(one, job, start, stop, adapters[one.adapter], self._files) for one in part.changes]
                rows = np.empty(weight.shape)
                bound = rebuild(needed, weight, rows, part.dtype == "F64")
                near = reach_of(rows, bound)
                for values, target in ((rows, exact), (near, reach)):
                    for one in part.matrix.write(values, start):
                        at = one.offset - first
                        target[at : at + one.values.size] = one.values.reshape(-1)
        return exact, reach

    def _unchanged(self, part: Part, job: Job, rows_of: ReadRows, exact: Array, first: int, last: int) -> None:
        """What lies between changes, or was brought."""
        width = part.width
        begin, end = max(first, part.first) - part.first, min(last, part.last) - part.first
        start, stop = begin // width, -(-end // width)
        step = max(1, BLOCK // max(1, width)) * part.unit
        for at in range(start // part.unit * part.unit, stop, step):
            rows = part.unchanged_rows(job.source, rows_of, at, min(at + step, part.rows))[:].reshape(-1)
            low = part.first + at * width - first
            cut = max(0, -low)
            rows = rows[cut : len(exact) - low]
            exact[low + cut : low + cut + len(rows)] = rows


def _differing(found: CodedRows, wanted: CodedRows) -> Array:
    """The elements, by number, whose values differ."""
    import numpy as np

    width = found.shape[1]
    return np.concatenate(
        [np.flatnonzero(found[some] != wanted[some]) + some.start * width for some in blocks(found.shape)]
    )


def _at(rows: CodedRows, elements: Array) -> Array:
    """The values of some elements, by number in order, in float64."""
    import numpy as np

    width, found = rows.shape[1], np.full(len(elements), np.nan)
    for some in blocks(rows.shape):
        first, last = np.searchsorted(elements, [some.start * width, some.stop * width])
        if first < last:
            found[first:last] = rows[some].reshape(-1)[elements[first:last] - some.start * width]
    return found


def _whole(info: TensorInfo, codes_of: ReadRows) -> Array:
    count = element_count(info.shape)
    found: Array = codes_of(slice_of(info, 0, count, (count,)), 0, count)[:]
    return found.reshape(info.shape)


def _same(one: Array, other: Array) -> bool:

    return bool(one.nbytes == other.nbytes and (_raw(one) == _raw(other)).all())


def _raw(array: Array) -> Array:
    import numpy as np

    found: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return found


def _wide(coded: TensorInfo) -> TensorInfo:
    """The coded tensor as float32 if its coding can give that: floats of 16 bits do not tell 8 bits of codes apart."""
    coding: Any = coded.coding
    if getattr(coding, "dtype", None) in ("BF16", "F16"):
        return replace(coded, dtype="F32", coding=replace(coding, dtype="F32"))
    return coded


def _reader(coded: TensorInfo, tensors: Mapping[str, Array]) -> ReadRows:
    """Reads rows of stored tensors, or of parts of them, that are in memory."""
    assert coded.coding is not None
    offsets = {info.name: info.offset or 0 for info in coded.coding.stored}

    def rows_of(info: TensorInfo, start: int, stop: int) -> Array:
        values = tensors[info.name].reshape(-1)
        first = ((info.offset or 0) - offsets[info.name]) // (BITS[info.dtype] // 8)
        found: Array = values[first : first + element_count(info.shape)].reshape(info.shape)[start:stop]
        return found.view(stored_dtype(info.dtype))

    return rows_of
