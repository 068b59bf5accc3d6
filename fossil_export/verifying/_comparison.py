"""A slab of a stored tensor against what it must be, in float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import BITS, element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._input import StoredArray
from fossil_export.checkpoints._source import Source, open_source
from fossil_export.checkpoints.layouts import ReadRows, Rows
from fossil_export.merging._change import Change, Part
from fossil_export.verifying._rebuilding import Addend, rebuild
from fossil_export.verifying._sum import Sum
from fossil_export.verifying.reference import EXACT
from fossil_export.verifying.reference._ulp import ulp

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


@dataclass(frozen=True)
class Sums:
    """Sums over some rows; `first` is the index of the first wrong element in the tensor, -1 for none."""

    worst: float
    off: int
    kept: float
    update: float
    first: int


@dataclass(frozen=True)
class Job:
    """A part of a tensor to compare; `source`, of the adapter number `owner` or else of the base, has the values of all
    parts that are no pieces."""

    name: str
    found: TensorInfo
    source: TensorInfo
    part: Part
    action: str
    owner: int | None = None

    @property
    def reader(self) -> int:
        """The number of the adapter that the stored values are read of, if they are not the base's."""
        return self.part.piece.adapter if self.part.piece is not None else self.owner or 0

    @property
    def as_bytes(self) -> bool:
        """Whether equal bytes are asked for, of whatever dtype."""
        same = self.source.dtype == self.found.dtype and self.source.offset is not None
        return not self.part.changes and self.part.piece is None and same

    @property
    def span(self) -> tuple[int, int]:
        """The bytes [first, last) of the tensor in the artifact."""
        bits, count = BITS[self.found.dtype], element_count(self.found.shape)
        whole = (self.part.first, self.part.last) == (0, count)
        return (0, self.found.nbytes) if whole else (self.part.first * bits // 8, self.part.last * bits // 8)

    @property
    def rows(self) -> int:
        """What the part is cut by: bytes, or its rows."""
        return self.span[1] - self.span[0] if self.as_bytes else self.part.rows

    @property
    def unit(self) -> int:
        """Rows that are rebuilt together."""
        return math.lcm(
            *(
                int(one.trained.numbers.get("block_rows") or EXACT[one.trained.method].unit(one.trained.tensors))
                for one in self.part.changes
            )
        )

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Row ranges; what is merged together stays together."""
        if not self.found.nbytes:
            return
        unit = self.part.whole_rows(self.unit)
        width = 1 if self.as_bytes else self.part.width * (BITS[self.source.dtype] // 8)
        count = max(1, SLAB // (max(1, width) * unit)) * unit
        for start in range(0, self.rows, count):
            yield start, min(start + count, self.rows)


class Files:
    """Open files by path, each held against the header that was read of it."""

    def __init__(self, files: Mapping[Path, tuple[Folder, Header]]) -> None:
        self._files = files
        self._open: dict[Path, Source] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in self._open.values():
            file.close()

    def _file(self, info: TensorInfo) -> Source:
        with self._lock:
            if info.path not in self._open:
                self._open[info.path] = open_source(*self._files[info.path])
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

    def rows(self, adapter: Adapter) -> ReadRows:
        """Rows of stored tensors, of which the adapter may be the owner."""

        def read(info: TensorInfo, start: int, stop: int) -> Any:
            if info.coding is not None:
                return CodedRows(info, self.codes, start, stop)
            return self.array(info, adapter)[start:stop]

        return read

    def codes(self, info: TensorInfo, start: int, stop: int) -> Any:
        """Rows of what values are decoded from."""
        assert info.offset is not None
        whole = StoredArray(self._file(info), info.offset, info.shape, stored_dtype(info.dtype))
        return whole if (start, stop) == (0, len(whole)) else whole[start:stop]  # of all of it, columns may be wanted

    def check(self) -> None:
        for file in self._open.values():
            file.check()


def compare(job: Job, start: int, stop: int, added: Sum, files: Files, progress: Callable[[int], None]) -> Sums:
    first, _ = job.span
    if job.as_bytes:
        size, count = 1, stop - start
        wanted, got = (files.read(info, first + start, count) for info in (job.source, job.found))
        part = _bytes(job, first + start, wanted, got)
    else:
        size, rows_of = job.part.width * (BITS[job.found.dtype] // 8), files.rows(added.adapters[job.reader])
        if job.part.changes:
            matrix = job.part.matrix
            stored = _whole(job.part.matrix_rows(rows_of, start, stop))
            found = _whole(matrix.moved(job.found).read(rows_of, start, stop))
        else:
            stored = _whole(job.part.unchanged_rows(job.source, rows_of, start, stop))
            found = _whole(replace(job.part, piece=None).unchanged_rows(job.found, rows_of, start, stop))
        addends = [
            addend(change, job, start, stop, added.adapters[change.adapter], files) for change in job.part.changes
        ]
        part = _values(job, start, stored, found, addends)
    progress((stop - start) * size)
    return part


def _bytes(job: Job, start: int, want: Array, found: Array) -> Sums:
    """Equal to the last bit; the dtype may be one that has no arithmetic here."""
    import numpy as np

    same = bool(np.array_equal(_words(want), _words(found)))
    if same:
        return Sums(0.0, 0, 0.0, 0.0, -1)
    bits = BITS[job.found.dtype]
    size = max(1, bits // 8)
    wrong = (want.reshape(-1, size) != found.reshape(-1, size)).any(axis=1)
    return Sums(float("inf"), int(wrong.sum()), 0.0, 0.0, (start + int(wrong.argmax()) * size) * 8 // bits)


def _words(raw: Array) -> Array:
    """The same bytes as wide integers where they divide, which compare faster."""
    import numpy as np

    return raw.view(np.uint64) if len(raw) % 8 == 0 else raw


def _whole(rows: Rows) -> Array:
    found: Array = rows[:]
    return found


def _values(job: Job, start: int, stored: Array, found: Array, addends: Sequence[Addend]) -> Sums:
    """Compare rows `stored` of the base, with the `addends` put to them, with those `found`."""
    import numpy as np

    rows = max(1, BLOCK // (found.shape[1] * job.unit)) * job.unit
    # Four arrays used over and over: allocating them for every block would cost more than the arithmetic.
    space = np.empty((4, min(rows, len(stored)), found.shape[1]))
    worst, off, kept, update = 0.0, 0, 0.0, 0.0
    marks: Array | None = None
    for at in range(0, len(stored), rows):
        weight, got, exact, steps = space[:, : min(rows, len(stored) - at)]
        np.copyto(weight, stored[at : at + rows])
        np.copyto(got, found[at : at + rows])
        bound = None
        if addends:
            needed = [one.part(at, at + len(weight)) for one in addends]
            bound = rebuild(needed, weight, exact, job.part.dtype == "F64")
        else:
            np.copyto(exact, weight)
        ulp(exact, job.found.dtype, steps)
        if addends:
            some = slice(None, None, SAMPLED)
            change = exact[some] - weight[some]
            update += float(np.einsum("ij,ij->", change, change))
            kept += float(np.einsum("ij,ij->", got[some] - weight[some], change))
        else:
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
        marks = np.zeros(found.shape, bool) if marks is None else marks
        marks[at : at + len(wrong)] = wrong
        off += int(np.count_nonzero(wrong))
    return Sums(worst, off, kept, update, _first(job, start, marks) if marks is not None and off else -1)


def _first(job: Job, start: int, marks: Array) -> int:
    """The first marked element of rows that begin at row `start` of a part: of the matrix, where that is the whole
    tensor, else of the tensor."""
    if not job.part.changes or job.part.last - job.part.first == element_count(job.found.shape):
        return job.part.first + start * job.part.width + int(marks.argmax())
    stored = job.part.matrix.write(marks, start)
    return min(one.offset + int(one.values.argmax()) for one in stored if one.values.any())


def addend(change: Change, job: Job, start: int, stop: int, adapter: Adapter, files: Files) -> Addend:
    """What rows [start, stop) need of the trained tensors as the merge sees them (float32, but for float64 weights), in
    float64; whole numbers in int64."""
    import numpy as np

    def seen(array: Array) -> Array:
        if array.dtype.kind in "iu":
            return array.astype(np.int64)
        return (array if job.part.dtype == "F64" else array.astype(np.float32)).astype(np.float64)

    trained = change.trained
    arrays = {role: trained.meant(role, files.array(info, adapter)) for role, info in trained.tensors.items()}
    part = EXACT[trained.method].part(arrays, start, stop)
    brought = job.owner is not None or job.part.piece is not None
    return Addend(change, {role: seen(array) for role, array in part.items()}, change.numbers(job.part.dtype, brought))
