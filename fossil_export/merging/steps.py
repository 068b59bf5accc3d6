"""A file of the plan cut into slabs: pieces of work that any thread can take in any order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fossil_export.checkpoints.dtypes import FLOATS, element_count
from fossil_export.merging.change import sampled_rows
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
    """Rows [start, stop) of a tensor that is merged, cast, or comes from a pickled adapter. The tensor begins at
    `offset` of the file being written."""

    tensor: TensorPlan
    start: int
    stop: int
    offset: int

    @property
    def target(self) -> int:
        """Where the rows go if they lie in the file as they are numbered."""
        return self.offset + self.start * (self.tensor.nbytes // rows_of(self.tensor))

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.count * (self.tensor.nbytes // rows_of(self.tensor))


def rows_of(tensor: TensorPlan) -> int:
    """A matrix is cut by its rows, however it lies; a tensor of two dimensions by its own; all else by elements."""
    if tensor.changes:
        return tensor.matrix.shape[0]
    return tensor.shape[0] if len(tensor.shape) == 2 else element_count(tensor.shape)


def _unit(tensor: TensorPlan) -> int:
    """Rows of a tensor that must not be cut apart."""
    return tensor.matrix.unit(sampled_rows(tensor.changes)) if tensor.changes else 1


def steps(file: FilePlan) -> Iterator[CopyStep | RowsStep]:
    """The slabs of `file` in its order; neighbouring untouched tensors become one range."""
    pending: CopyStep | None = None
    for tensor, offset in file.tensors:
        if tensor.nbytes == 0:
            continue
        source = tensor.source.offset
        # A whole tensor of the adapter's is looked at too: it must be finite.
        looked_at = tensor.origin == "adapter" and tensor.dtype in FLOATS
        if tensor.changes or tensor.dtype != tensor.source.dtype or source is None or looked_at:
            yield from _row_steps(tensor, offset)
            continue
        step = CopyStep(tensor.source.path, source, offset, tensor.nbytes)
        if pending is not None and _follows(pending, step):
            pending = CopyStep(pending.path, pending.source, pending.target, pending.nbytes + step.nbytes)
            continue
        if pending is not None:
            yield from _copy_steps(pending)
        pending = step
    if pending is not None:
        yield from _copy_steps(pending)


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


def _row_steps(tensor: TensorPlan, offset: int) -> Iterator[RowsStep]:
    rows, unit = rows_of(tensor), _unit(tensor)
    size = tensor.nbytes // rows
    step = max(1, SLAB // (size * unit)) * unit
    for start in range(0, rows, step):
        yield RowsStep(tensor, start, min(start + step, rows), offset)
