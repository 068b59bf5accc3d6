"""A file of the plan cut into slabs: pieces of work that any thread can take in any order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fossil_export.checkpoints.dtypes import FLOATS, itemsize
from fossil_export.merging.change import Part
from fossil_export.merging.layout import FilePlan, TensorPlan

SLAB = 8 << 20
"""Bytes written at a time."""


@dataclass(frozen=True, slots=True)
class CopyStep:
    """Bytes taken as they are: from offset `source` of `path` to offset `target` of the file being written."""

    path: Path
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RowsStep:
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
    def target(self) -> int:
        """Where the rows go if they lie in the file as they are numbered."""
        return self.offset + (self.part.first + self.start * self.part.width) * itemsize(self.tensor.dtype)


def steps(file: FilePlan) -> Iterator[CopyStep | RowsStep]:
    """The slabs of `file` in its order; neighbouring untouched tensors become one range."""
    pending: CopyStep | None = None
    for tensor, offset in file.tensors:
        if tensor.nbytes == 0:
            continue
        for part in tensor.parts:
            step = _copied(tensor, part, offset)
            if step is None:
                yield from _row_steps(tensor, part, offset)
            elif pending is not None and _follows(pending, step):
                pending = CopyStep(pending.path, pending.source, pending.target, pending.nbytes + step.nbytes)
            else:
                if pending is not None:
                    yield from _copy_steps(pending)
                pending = step
    if pending is not None:
        yield from _copy_steps(pending)


def _copied(tensor: TensorPlan, part: Part, offset: int) -> CopyStep | None:
    """The range of a part that is taken as it is; None for one that is computed, or looked at."""
    source = tensor.source.offset
    # A whole tensor of the adapter's is looked at too: it must be finite.
    looked_at = tensor.origin == "adapter" and tensor.dtype in FLOATS
    if part.changes or tensor.dtype != tensor.source.dtype or source is None or looked_at:
        return None
    if not tensor.changes:
        return CopyStep(tensor.source.path, source, offset, tensor.nbytes)
    before, size = part.first * itemsize(tensor.dtype), (part.last - part.first) * itemsize(tensor.dtype)
    return CopyStep(tensor.source.path, source + before, offset + before, size)


def _follows(first: CopyStep, second: CopyStep) -> bool:
    ends = (first.path, first.source + first.nbytes, first.target + first.nbytes)
    return ends == (second.path, second.source, second.target)


def _copy_steps(whole: CopyStep) -> Iterator[CopyStep]:
    """Cut at multiples of the slab in the target, so that only the outer ends are partial pages."""
    start, end = whole.target, whole.target + whole.nbytes
    while start < end:
        stop = min(end, (start // SLAB + 1) * SLAB)
        yield CopyStep(whole.path, whole.source + start - whole.target, start, stop - start)
        start = stop


def _row_steps(tensor: TensorPlan, part: Part, offset: int) -> Iterator[RowsStep]:
    unit = part.unit
    step = max(1, SLAB // (part.width * itemsize(tensor.dtype) * unit)) * unit
    for start in range(0, part.rows, step):
        yield RowsStep(tensor, part, start, min(start + step, part.rows), offset)
