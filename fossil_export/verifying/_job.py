"""What is compared: parts of tensors, cut into pieces that any thread can take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fossil_export.checkpoints._dtypes import BITS, element_count, itemsize
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._plain import Plain
from fossil_export.checkpoints.layouts._rows import FusedRows
from fossil_export.merging._change import Part
from fossil_export.verifying.reference import EXACT

SLAB = 4 << 20
"""Bytes of the base looked at per piece."""

BLOCK = 1 << 18
"""Elements computed at a time, so that float64 stays in the cache."""

TRAINED = 1 << 19
"""Trained elements that are held for the columns of a piece."""


@dataclass(frozen=True)
class Sums:
    """Sums over some rows; `first` is the index of the first wrong element in the tensor, -1 for none."""

    worst: float = 0.0
    off: int = 0
    kept: float = 0.0
    update: float = 0.0
    first: int = -1

    def __add__(self, other: Sums) -> Sums:
        firsts = [one for one in (self.first, other.first) if one >= 0]
        return Sums(
            max(self.worst, other.worst),
            self.off + other.off,
            self.kept + other.kept,
            self.update + other.update,
            min(firsts, default=-1),
        )


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
    def in_order(self) -> bool:
        """Whether the rows lie in files one after another, so that some columns of them can be read."""
        if self.part.piece is not None or self.source.offset is None or self.source.coding is not None:
            return False
        if not self.part.changes:
            return True
        matrix = self.part.matrix
        return isinstance(matrix, Plain) or (isinstance(matrix, FusedRows) and matrix.order is None)

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
        yield from _ranges(self.rows, unit, SLAB // (max(1, self.part.width * itemsize(self.source.dtype)) * unit))

    def pieces(self) -> Iterator[Piece]:
        """All of it: some columns after others, if whole rows are too long."""
        if not self.found.nbytes:
            return
        if self.as_bytes:
            for start in range(0, self.rows, SLAB):
                yield Piece(self, start, min(start + SLAB, self.rows), 0, 1)
            return
        width, unit = self.part.width, self.part.whole_rows(self.unit)
        for first, last in _ranges(width, *self._columns(unit)):
            row = (last - first) * itemsize(self.source.dtype) * unit
            for start, stop in _ranges(self.rows, unit, SLAB // max(1, row)):
                yield Piece(self, start, stop, first, last)

    def _columns(self, unit: int) -> tuple[int, int]:
        """Columns that go together, and how many times these are taken at once."""
        if not self.in_order:
            return self.part.width, 1
        together, trained = 1, 1
        for change in self.part.changes:
            across = getattr(EXACT[change.trained.method], "across", None)
            found = across(change.trained.tensors) if across is not None and not change.trained.columns else None
            if found is None:
                return self.part.width, 1
            together, trained = math.lcm(together, found[0]), max(trained, found[1])
        return together, min(BLOCK // unit, TRAINED // trained) // together


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a job and the columns [first, last) of them; bytes, if it is compared as such."""

    job: Job
    start: int
    stop: int
    first: int
    last: int

    @property
    def width(self) -> int:
        return self.last - self.first

    @property
    def is_whole(self) -> bool:
        """Whether it has whole rows."""
        return self.width == self.job.part.width

    @property
    def nbytes(self) -> int:
        """In the artifact."""
        count = (self.stop - self.start) * self.width
        return count if self.job.as_bytes else count * itemsize(self.job.found.dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows that are computed at a time."""
        unit = self.job.unit
        for start, stop in _ranges(self.stop - self.start, unit, BLOCK // max(1, self.width * unit)):
            yield self.start + start, self.start + stop


def _ranges(count: int, together: int, times: int) -> Iterator[tuple[int, int]]:
    """Numbers under `count` in ranges of `times` (one, at least) `together`."""
    step = max(1, together) * max(1, times)
    for start in range(0, count, step):
        yield start, min(start + step, count)
