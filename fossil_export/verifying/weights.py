"""Weights level: every stored tensor against the base and a float64 reconstruction, streamed.

Untouched tensors must be the base's bytes. A merged one must be the exact W' rounded once: no element may
be further from it than half a step of its dtype, plus the float32 arithmetic's own error (`TOLERANCE` for
a sum, a proven bound for bat's products).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints.checkpoint import Checkpoint
from fossil_export.checkpoints.dtypes import BITS, BY_TORCH_NAME, FLOATS, element_count, numpy_dtype
from fossil_export.checkpoints.header import Header, TensorInfo
from fossil_export.checkpoints.layouts import Rows, Source
from fossil_export.checkpoints.source import InputFile, StoredArray
from fossil_export.merging.change import Change
from fossil_export.merging.place import place
from fossil_export.merging.placement import Places, together
from fossil_export.merging.ties import are_equal
from fossil_export.threads import in_order, one_blas_thread
from fossil_export.verifying.reference import EXACT
from fossil_export.verifying.reference.steps import step

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

TOLERANCE = 2.0**-10
"""Steps beyond half of one that rounding to float32 before rounding to 16 bits can cost."""

SAMPLED = 8
"""One row in so many is measured for the survival of the update."""

SLAB = 4 << 20
BLOCK = 1 << 18
"""Bytes of the base looked at per task; elements computed at a time, so that float64 stays in the cache."""

AHEAD = 4
"""Tasks that wait for each thread: enough that none is idle, few enough that they take no memory in any model."""


@dataclass(frozen=True)
class TensorCheck:
    """The comparison of one tensor.

    `worst` error is in steps of its dtype, for bat less the bound of float32's own; `off` elements, of
    `elements`, are not the exact result rounded once. `survived` is the share of the update that was stored,
    on one row in `SAMPLED` (None for an unmerged tensor); `problem` is None for a tensor as it should be.
    """

    name: str
    action: str
    module: str | None = None
    elements: int = 0
    worst: float = 0.0
    off: int = 0
    kept: float = 0.0
    update: float = 0.0
    problem: str | None = None

    @property
    def survived(self) -> float | None:
        return self.kept / self.update if self.update else None


@dataclass(frozen=True)
class _Part:
    """Sums over some rows; `first` is the index of the first wrong element in the tensor, -1 for none."""

    worst: float
    off: int
    kept: float
    update: float
    first: int


def check_weights(
    artifact: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    dtype: str = "auto",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[TensorCheck, ...]:
    """Compare every tensor of `artifact` with what `adapter` on `base` must give, in the base's order.

    `dtype` is what the merge was asked for ("auto": each tensor keeps its own). Reads every byte once, in
    little memory. Raises MergeError where the adapter does not belong to the base.
    """
    places = _places(adapter, base)
    names = [*base.tensors, *places.added]
    jobs = [_expected(name, artifact, base, places, dtype) for name in names]
    headers = [*artifact.files, *base.files, *([adapter.header] if adapter.header is not None else [])]
    threads = os.cpu_count() or 1
    with one_blas_thread(), _Files(headers) as files, ThreadPoolExecutor(threads) as pool:
        slabs = ((job, *rows) for job in jobs if isinstance(job, _Job) for rows in job.slabs())
        calls = (partial(_compare, job, start, stop, adapter, files, progress) for job, start, stop in slabs)
        with closing(in_order(pool, calls, AHEAD * threads)) as parts:
            checks = [_summary(job, parts) if isinstance(job, _Job) else job for job in jobs]
        files.check()
    wanted = set(names)
    checks += [
        TensorCheck(name, "extra", problem="is in the artifact, but neither in the base nor in the adapter")
        for name in artifact.tensors
        if name not in wanted
    ]
    return tuple(checks)


def _places(adapter: Adapter, base: Checkpoint) -> Places:
    placement = place(adapter, base)
    if placement.undecided is not None:
        placement = place(adapter, base, are_equal(adapter, base, placement))
    return together([adapter], [placement], [1.0])


@dataclass(frozen=True)
class _Job:
    name: str
    found: TensorInfo
    source: TensorInfo
    change: Change | None
    action: str

    @property
    def as_bytes(self) -> bool:
        """Whether equal bytes are asked for, of whatever dtype."""
        return self.change is None and self.source.dtype == self.found.dtype and self.source.offset is not None

    @property
    def rows(self) -> int:
        """What the tensor is cut by: bytes, or else rows of its matrix, or else elements."""
        if self.as_bytes:
            return self.found.nbytes
        if self.change is not None:
            return self.change.into.shape[0]
        return self.found.shape[0] if len(self.found.shape) == 2 else element_count(self.found.shape)

    @property
    def unit(self) -> int:
        """Rows that are rebuilt together."""
        return EXACT[self.change.trained.method].unit(self.change.trained.tensors) if self.change is not None else 1

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Row ranges; what is merged together stays together."""
        if not self.found.nbytes:
            return
        unit = self.unit if self.change is None else self.change.into.unit(self.unit)
        size = max(1, self.source.nbytes // self.rows) * unit
        count = max(1, SLAB // size) * unit
        for start in range(0, self.rows, count):
            yield start, min(start + count, self.rows)


def _expected(name: str, artifact: Checkpoint, base: Checkpoint, places: Places, dtype: str) -> _Job | TensorCheck:
    """What to compare tensor `name` with, or the check that already failed."""
    own = base.tensors.get(name)
    source, owner = places.sources.get(name, (own, None))
    assert source is not None, name
    change = next(iter(places.changes.get(name, ())), None)
    action = "merge" if change is not None else "replace" if owner is not None else "copy"
    found = artifact.tensors.get(name)

    def failed(problem: str) -> TensorCheck:
        module = change.trained.module if change is not None else None
        return TensorCheck(name, action, module, worst=float("inf"), problem=problem)

    if found is None:
        return failed("is missing from the artifact")
    stored = own.dtype if own is not None else source.dtype
    wanted = BY_TORCH_NAME[dtype] if dtype != "auto" and stored in FLOATS else stored
    if found.dtype != wanted:
        return failed(f"is stored as {found.dtype}, should be {wanted}")
    if found.shape != source.shape:
        return failed(f"has shape {list(found.shape)}, should have {list(source.shape)}")
    return _Job(name, found, source, change, action)


class _Files:
    """Open files by path, each held against the header that was read of it."""

    def __init__(self, headers: list[Header]) -> None:
        self._headers = {header.path: header for header in headers}
        self._open: dict[Path, InputFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in self._open.values():
            file.close()

    def _file(self, info: TensorInfo) -> InputFile:
        with self._lock:
            if info.path not in self._open:
                self._open[info.path] = InputFile(info.path, self._headers[info.path])
            return self._open[info.path]

    def read(self, info: TensorInfo, start: int, nbytes: int) -> Array:
        """`nbytes` bytes of a tensor, from its byte `start` on, as uint8."""
        import numpy as np

        assert info.offset is not None
        found = np.empty(nbytes, np.uint8)
        self._file(info).read(info.offset + start, found)
        return found

    def array(self, info: TensorInfo, adapter: Adapter) -> Array | StoredArray:
        """A tensor, of which what is sliced is read."""
        if info.offset is None:
            return adapter.array(info)
        return StoredArray(self._file(info), info.offset, info.shape, numpy_dtype(info.dtype))

    def rows(self, adapter: Adapter) -> Source:
        """Rows of stored tensors, of which the adapter may be the owner."""

        def read(info: TensorInfo, start: int, stop: int) -> Any:
            return self.array(info, adapter)[start:stop]

        return read

    def check(self) -> None:
        for file in self._open.values():
            file.check()


def _compare(
    job: _Job, start: int, stop: int, adapter: Adapter, files: _Files, progress: Callable[[int], None]
) -> _Part:
    size = job.found.nbytes // job.rows
    if job.change is not None:
        matrix, source = job.change.into, files.rows(adapter)
        stored = _whole(matrix.read(source, start, stop))
        found = _whole(matrix.moved(job.found).read(source, start, stop))
        part = _values(job, start, stored, found, _trained(job, start, stop, adapter, files))
    elif job.as_bytes:
        part = _bytes(
            job, start, files.read(job.source, start, stop - start), files.read(job.found, start, stop - start)
        )
    else:
        raw = files.read(job.found, start * size, (stop - start) * size)
        found = raw.view(numpy_dtype(job.found.dtype)).reshape(stop - start, -1)
        if job.source.offset is None:
            stored = adapter.array(job.source).reshape(job.rows, -1)[start:stop]
        else:
            size_of_source = job.source.nbytes // job.rows
            raw = files.read(job.source, start * size_of_source, (stop - start) * size_of_source)
            stored = raw.view(numpy_dtype(job.source.dtype)).reshape(stop - start, -1)
        part = _values(job, start, stored, found, None)
    progress((stop - start) * size)
    return part


def _bytes(job: _Job, start: int, want: Array, found: Array) -> _Part:
    """Equal to the last bit; the dtype may be one that has no arithmetic here."""
    import numpy as np

    same = bool(np.array_equal(_words(want), _words(found)))
    if same:
        return _Part(0.0, 0, 0.0, 0.0, -1)
    bits = BITS[job.found.dtype]
    size = max(1, bits // 8)
    wrong = (want.reshape(-1, size) != found.reshape(-1, size)).any(axis=1)
    return _Part(float("inf"), int(wrong.sum()), 0.0, 0.0, (start + int(wrong.argmax()) * size) * 8 // bits)


def _words(raw: Array) -> Array:
    """The same bytes as wide integers where they divide, which compare faster."""
    import numpy as np

    return raw.view(np.uint64) if len(raw) % 8 == 0 else raw


def _whole(rows: Rows) -> Array:
    found: Array = rows[:]
    return found


def _values(job: _Job, start: int, stored: Array, found: Array, trained: Mapping[str, Array] | None) -> _Part:
    """Compare rows `stored` of the base, changed by what they need of the `trained`, with those `found`."""
    import numpy as np

    exactly = EXACT[job.change.trained.method] if job.change is not None else None
    rows = max(1, BLOCK // (found.shape[1] * job.unit)) * job.unit
    # Four arrays used over and over: allocating them for every block would cost more than the arithmetic.
    space = np.empty((4, min(rows, len(stored)), found.shape[1]))
    worst, off, kept, update, first = 0.0, 0, 0.0, 0.0, -1
    for at in range(0, len(stored), rows):
        weight, got, exact, steps = space[:, : min(rows, len(stored) - at)]
        np.copyto(weight, stored[at : at + rows])
        np.copyto(got, found[at : at + rows])
        bound = None
        if exactly is not None:
            assert trained is not None and job.change is not None
            needed = exactly.part(trained, at, at + len(weight))
            bound = exactly.rebuild(weight, needed, job.change.trained.numbers, exact)
        else:
            np.copyto(exact, weight)
        step(exact, job.found.dtype, steps)
        if exactly is not None:
            some = slice(None, None, SAMPLED)
            change = exact[some] - weight[some]
            update += float(np.einsum("ij,ij->", change, change))
            kept += float(np.einsum("ij,ij->", got[some] - weight[some], change))
        if exactly is None:
            # A base may hold infinities (masks), whose cast is compared as it is.
            alike = ~np.isfinite(exact) & ((got == exact) | np.isnan(got) & np.isnan(exact))
            got[alike] = exact[alike] = 0.0
        with np.errstate(invalid="ignore"):
            error = np.subtract(got, exact, out=got)
            np.abs(error, out=error)
            error /= steps
        if bound is not None:
            error -= np.divide(bound, steps, out=bound)  # what the float32 products may cost
        furthest = float(error.max())  # NaN if any is
        worst = max(worst, furthest if furthest == furthest else float("inf"))
        if furthest <= 0.5 + TOLERANCE:
            continue
        wrong = ~(error <= 0.5 + TOLERANCE)
        if (count := int(np.count_nonzero(wrong))) and first < 0:
            first = (start + at) * found.shape[1] + int(wrong.reshape(-1).argmax())
        off += count
    return _Part(worst, off, kept, update, first)


def _trained(job: _Job, start: int, stop: int, adapter: Adapter, files: _Files) -> dict[str, Array]:
    """What rows [start, stop) need of the trained tensors as the merge sees them (float32, but for float64 weights), in
    float64."""
    import numpy as np

    assert job.change is not None
    trained = job.change.trained
    arrays = {role: files.array(info, adapter) for role, info in trained.tensors.items()}
    part = EXACT[trained.method].part(arrays, start, stop)
    return {
        role: (array if job.source.dtype == "F64" else array.astype(np.float32)).astype(np.float64)
        for role, array in part.items()
    }


def _summary(job: _Job, found: Iterator[_Part]) -> TensorCheck:
    """The check of a tensor whose slabs are the next ones in `found`."""
    parts = list(islice(found, sum(1 for _ in job.slabs())))
    off = sum(part.off for part in parts)
    worst = max((part.worst for part in parts), default=0.0)
    problem = None
    if off:
        first = next(part.first for part in parts if part.first >= 0)
        width = job.found.shape[-1] if len(job.found.shape) == 2 else 0
        where = f"[{first // width}, {first % width}]" if width else f"[{first}]"
        problem = f"{off} of {element_count(job.found.shape)} elements are off, the first at {where}"
        if job.action == "copy" and job.as_bytes:
            problem += "; the adapter does not touch it, it should be the base's bytes"
        else:
            problem += f", worst by {worst:.3g} steps of {job.found.dtype}"
    return TensorCheck(
        name=job.name,
        action=job.action,
        module=job.change.trained.module if job.change is not None else None,
        elements=element_count(job.found.shape),
        worst=worst,
        off=off,
        kept=sum(part.kept for part in parts),
        update=sum(part.update for part in parts),
        problem=problem,
    )
