"""A file of the plan cut into slabs: pieces of work that any thread can take in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fossil_export.checkpoints._dtypes import FLOATS, itemsize
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.merging._change import Part
from fossil_export.merging._layout import FilePlan, TensorPlan
from fossil_export.merging._requantize import part_of, ranges

SLAB = 4 << 20
"""Bytes written at a time. A disk is as fast with 1 MB, but each slab costs calls."""


@dataclass(frozen=True, slots=True)
class CopySlab:
    """Bytes taken as they are: from offset `read_at` of `path` to offset `write_at` of the file being written."""

    path: Path
    read_at: int
    write_at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RowsSlab:
    """Rows [start, stop) of a part of a tensor that is merged, cast, or comes from a pickled adapter. The tensor begins
    at `offset` of the file being written."""

    tensor: TensorPlan
    part: Part
    start: int
    stop: int
    offset: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.count * self.part.width * itemsize(self.tensor.dtype)

    @property
    def write_at(self) -> int:
        """Where the rows go if they lie in the file as they are numbered."""
        return self.offset + (self.part.first + self.start * self.part.width) * itemsize(self.tensor.dtype)


@dataclass(frozen=True, slots=True)
class EncodeSlab:
    """Rows [start, stop) of the matrix of a weight that is merged and quantized again, which are quantized together:
    what they have of its stored tensors in this file, with their offsets."""

    weight: TensorPlan
    start: int
    stop: int
    tensors: tuple[tuple[TensorInfo, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info, _ in self.tensors)


Slab = CopySlab | RowsSlab | EncodeSlab


def slabs(file: FilePlan) -> Iterator[Slab]:
    """The slabs of `file` in its order; neighbouring untouched tensors become one range."""
    pending: CopySlab | None = None
    encoded: dict[str, list[tuple[TensorPlan, int]]] = {}
    for tensor, offset in file.tensors:
        if tensor.encodes is not None:
            encoded.setdefault(tensor.encodes.name, []).append((tensor, offset))
    for own in encoded.values():
        yield from _encode_slabs(own)
    for tensor, offset in file.tensors:
        if tensor.nbytes == 0 or tensor.encodes is not None:
            continue
        for part in tensor.parts:
            slab = _copied(tensor, part, offset)
            if slab is None:
                yield from row_slabs(tensor, part, offset)
            elif pending is not None and _follows(pending, slab):
                pending = CopySlab(pending.path, pending.read_at, pending.write_at, pending.nbytes + slab.nbytes)
            else:
                if pending is not None:
                    yield from _copy_slabs(pending)
                pending = slab
    if pending is not None:
        yield from _copy_slabs(pending)


def _encode_slabs(own: Sequence[tuple[TensorPlan, int]]) -> Iterator[EncodeSlab]:
    weight, coded = own[0][0].weight, own[0][0].coded
    assert coded is not None
    offsets = {tensor.name: (tensor.source, offset) for tensor, offset in own}
    for start, stop in ranges(coded, weight.parts):
        part = part_of(coded, start, stop)
        assert part.coding is not None
        found = []
        for info in part.coding.stored:
            if info.name in offsets:
                whole, offset = offsets[info.name]
                found.append((info, offset + (info.offset or 0) - (whole.offset or 0)))
        yield EncodeSlab(weight, start, stop, tuple(found))


def _copied(tensor: TensorPlan, part: Part, offset: int) -> CopySlab | None:
    """The range of a part that is taken as it is; None for one that is computed, or looked at."""
    start = tensor.source.offset
    # What the adapter brought is looked at too: it must be finite.
    looked_at = (tensor.owner is not None and tensor.dtype in FLOATS) or part.piece is not None
    if part.changes or tensor.dtype != tensor.source.dtype or start is None or looked_at:
        return None
    if not tensor.changes and not tensor.pieces:
        return CopySlab(tensor.source.path, start, offset, tensor.nbytes)
    before, size = part.first * itemsize(tensor.dtype), (part.last - part.first) * itemsize(tensor.dtype)
    return CopySlab(tensor.source.path, start + before, offset + before, size)


def _follows(first: CopySlab, second: CopySlab) -> bool:
    ends = (first.path, first.read_at + first.nbytes, first.write_at + first.nbytes)
    return ends == (second.path, second.read_at, second.write_at)


def _copy_slabs(whole: CopySlab) -> Iterator[CopySlab]:
    """Cut at multiples of a slab in the file being written, so that only the outer ends are partial pages."""
    start, end = whole.write_at, whole.write_at + whole.nbytes
    while start < end:
        stop = min(end, (start // SLAB + 1) * SLAB)
        yield CopySlab(whole.path, whole.read_at + start - whole.write_at, start, stop - start)
        start = stop


def row_slabs(tensor: TensorPlan, part: Part, offset: int, span: tuple[int, int] | None = None) -> Iterator[RowsSlab]:
    """Those of a part; of one that nothing changes only the elements in `span`, if it is given."""
    first, last = 0, part.rows
    if span is not None and not part.changes:
        first = max(span[0] - part.first, 0) // part.width
        last = -(-(min(span[1], part.last) - part.first) // part.width)
    rows = slab_rows(tensor, part)
    for start in range(first, last, rows):
        yield RowsSlab(tensor, part, start, min(start + rows, last), offset)


def slab_rows(tensor: TensorPlan, part: Part) -> int:
    """Rows of a part that are worked on together: those of `SLAB` bytes, in whole units, at least one."""
    unit = part.unit
    rows = max(1, SLAB // max(1, part.width * itemsize(tensor.dtype) * unit)) * unit
    for period in part.periods:
        if rows >= period:
            rows -= rows % period
        else:
            rows = next(count for count in range(rows, 0, -unit) if period % count == 0)
    return rows
