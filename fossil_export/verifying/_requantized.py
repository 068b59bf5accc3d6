"""Weights level of a merge that kept the base's quantization: is what is stored the merged weight, quantized once?

Stored tensors that no change touches must be the base's bytes. A weight that changes is rebuilt in float64; what the
merge had of it in float32 is within `_reach` of that. It is quantized here from the exact values and from others within
that reach (`_nearby`), and the artifact must have what one of them gives:

- scales, zeros and other parameters lie between those of the nearby values (encoders are monotone in what they measure:
  only a tie in their rounding can be between);
- a code stands for the same value as the code of a nearby one on the artifact's own parameters. Where parameters have
  such ties, any code will do that is no further from the exact value than the best of these: the artifact's code is the
  nearest on its parameters to a value within reach, so that it is further by twice the reach at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._coding import BLOCK, CodedRows
from fossil_export.checkpoints._dtypes import BITS, element_count, stored_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.merging._change import Part, parts_of
from fossil_export.merging._placement import Places
from fossil_export.merging._requantize import part_of, ranges
from fossil_export.verifying._comparison import Files, Job, addend
from fossil_export.verifying._rebuilding import rebuild
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck, check_tensors, places_of

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

UNIT = 2.0**-24
"""The error of one rounding to float32."""

ROUNDED = {"BF16": 2.0**-7, "F16": 2.0**-10}
"""What rounding two values before they are quantized can put between them, for encoders that do (`rounds_to`)."""


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
    headers = [*theirs.files, *ours.files, *(header for one in added.adapters for header in one.headers)]
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

        exact, reach = self._exact(start * width, stop * width)
        exact, reach = exact.reshape(-1, width), reach.reshape(-1, width)
        codes_of = self._files.codes
        own, found = part_of(self._own, start, stop), part_of(self._found, start, stop)
        mine: Any = own.coding
        encoder = mine.encoder(codes_of) if hasattr(mine, "encoder") else mine
        assert mine is not None and found.coding is not None
        stored = {info.name: _whole(info, codes_of) for info in found.coding.stored}
        if not np.isfinite(exact).all():
            self._beside = "is not finite as the adapter has it"
            return
        given: list[Mapping[str, Array]] = []
        for values in _nearby(exact, reach):
            given.append(encoder.encode(values))
            if all(_same(given[-1][name], stored[name]) for name in stored):
                break
        alike = given[-1:] if all(_same(given[-1][name], stored[name]) for name in stored) else []
        ties = False
        for info in found.coding.stored[1:] if not alike else ():
            ties = ties or not _same(given[0][info.name], stored[info.name])
            if wrong := _outside(info, stored[info.name], [one[info.name] for one in given]):
                self._beside = self._beside or wrong
        names = [info.name for info in found.coding.stored]
        flat = replace(_wide(found), shape=exact.shape)

        def rows_with(codes: Array) -> CodedRows:
            return CodedRows(flat, _reader(found, {**stored, names[0]: codes}), 0, len(exact))

        after = rows_with(stored[names[0]])
        others = [rows_with(one[names[0]]) for one in given if not alike]
        before = None
        if not self._brought:
            before = CodedRows(replace(own, shape=exact.shape), self._files.codes, 0, len(exact))
        first_rounded = ROUNDED.get(getattr(mine, "rounds_to", None) or "", 8 * UNIT)
        step = max(1, BLOCK // max(1, width))
        for at in range(0, len(exact), step):
            some = slice(at, min(at + step, len(exact)))
            values = after[some].astype(np.float64)
            if others:
                wrong_here = self._differing(exact[some], reach[some], values, others, some, ties, first_rounded)
                if count := int(np.count_nonzero(wrong_here)):
                    if not self._wrong:
                        self._first = (start + at) * width + int(wrong_here.argmax())
                    self._wrong += count
            if before is not None:
                was = before[some].astype(np.float64)
                update = exact[some] - was
                self._update += float(np.einsum("ij,ij->", update, update))
                self._kept += float(np.einsum("ij,ij->", values - was, update))

    def _differing(
        self,
        exact: Array,
        reach: Array,
        values: Array,
        others: list[CodedRows],
        some: slice,
        ties: bool,
        first_rounded: float,
    ) -> Array:
        import numpy as np

        wrong = np.ones(values.shape, bool)
        nearest = np.full(values.shape, np.inf)
        for one in others:
            theirs = one[some].astype(np.float64)
            wrong &= theirs != values
            np.minimum(nearest, np.abs(theirs - exact), out=nearest)
        if ties and wrong.any():
            more = 2.0 * reach + first_rounded * np.abs(exact)
            wrong &= ~(np.abs(values - exact) <= nearest + more)
        return wrong

    def _exact(self, first: int, last: int) -> tuple[Array, Array]:
        """Elements [first, last) in float64, and how far the merge's float32 may be from them."""
        import numpy as np

        exact, reach = np.empty(last - first), np.zeros(last - first, np.float32)
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
                near = _reach(rows, bound)
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


def _reach(exact: Array, bound: Array | None) -> Array:
    """How far from the exact values those may be that were computed in float32 and rounded to it, and then some."""
    import numpy as np

    found: Array = np.abs(exact) * (4 * UNIT) + 2.0**-140
    return found if bound is None else found + 2.0 * bound


def _nearby(exact: Array, reach: Array) -> Iterator[Array]:
    """The exact values in float32, and others within reach of them: all larger or smaller, in size or as numbers, and
    some of each."""
    import numpy as np

    yield exact.astype(np.float32)
    signs = np.sign(exact)
    for times in (signs, -signs, np.ones((1, 1)), -np.ones((1, 1))):
        yield (exact + times * reach).astype(np.float32)
    generator = np.random.default_rng(0)
    for _ in range(2):
        some = generator.integers(0, 2, exact.shape, np.int8) * 2 - 1
        yield (exact + some * reach).astype(np.float32)
        yield (exact - some * reach).astype(np.float32)


def _whole(info: TensorInfo, codes_of: ReadRows) -> Array:
    count = element_count(info.shape)
    found: Array = codes_of(slice_of(info, 0, count, (count,)), 0, count)[:]
    return found.reshape(info.shape)


def _same(one: Array, other: Array) -> bool:
    import numpy as np

    return bool(one.nbytes == other.nbytes and (_raw(one) == _raw(other)).all())


def _raw(array: Array) -> Array:
    import numpy as np

    found: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return found


def _outside(info: TensorInfo, found: Array, nearby: list[Array]) -> str | None:
    """What is wrong with a parameter that is not among, or between, those of the nearby values."""
    import numpy as np

    if info.dtype == "U8" and (texts := [_json(one) for one in (found, *nearby)]) and texts[0] is not None:
        return None if all(_between(texts[0], texts[1:], key) for key in texts[0]) else f"has another {info.name}"
    wide = [one.reshape(-1).astype(np.float64) for one in (found, *nearby)]
    inside = (wide[0] >= np.minimum.reduce(wide[1:])) & (wide[0] <= np.maximum.reduce(wide[1:]))
    if inside.all():
        return None
    return f"has {int((~inside).sum())} other values in {info.name}, the first at [{int((~inside).argmax())}]"


def _json(array: Array) -> dict[str, Any] | None:
    try:
        found = json.loads(_raw(array).tobytes())
    except (ValueError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None


def _between(found: dict[str, Any], nearby: list[dict[str, Any] | None], key: str) -> bool:
    values = [one.get(key) for one in nearby if one is not None]
    if isinstance(found[key], float) and all(isinstance(one, float) for one in values):
        floats: list[float] = values  # type: ignore[assignment]
        own: float = found[key]
        return min(floats) <= own <= max(floats)
    return bool(found[key] in values)


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
