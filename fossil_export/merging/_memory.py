"""How much memory a merge takes: as many threads at a time as fit into a budget, and not more on more cores.

A thread has what one slab takes: the bytes to write, a block of rows as it is stored and as it is computed with. What
threads share are trained tensors that a method needs whole (`Kept`). Both are known from headers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import element_count, itemsize, numpy_dtype
from fossil_export.merging._change import Change, Part
from fossil_export.merging._kept import ROOM, SMALL
from fossil_export.merging._layout import FilePlan, TensorPlan
from fossil_export.merging._slabs import SLAB, slab_rows

if TYPE_CHECKING:
    import numpy as np

BUDGET = 112 << 20
"""Bytes that the threads of a merge and what they share may take, if no slab needs more by itself."""

THREADS = 12
"""At most; four keep a disk busy with slabs of 1 MB."""

_COPIED = 2 * SLAB
# A slab that is copied: a buffer, or pages of a map.


@dataclass(frozen=True)
class Bounds:
    """Threads that may work on a file, and bytes of whole trained tensors that they may share."""

    threads: int
    room: int


def bounds_of(file: FilePlan, block: int) -> Bounds:
    """For a file whose rows are worked on in blocks of so many elements."""
    wanted = min(THREADS, (os.cpu_count() or 1) + 6)
    private, shared = _COPIED, 0
    seen: set[Any] = set()
    for tensor, _ in file.tensors:
        if tensor.nbytes <= SMALL // 16 or tensor.encodes is not None:
            continue
        for part in tensor.parts:
            alike = _kind(tensor, part)
            if alike not in seen:
                seen.add(alike)
                own, whole = _needs(tensor, part, block)
                private, shared = max(private, own), max(shared, whole)
    threads = min(wanted, max(1, (BUDGET - max(shared, ROOM)) // private))
    return Bounds(threads, max(ROOM, BUDGET - threads * private))


def _kind(tensor: TensorPlan, part: Part) -> Any:
    """The same for parts that take the same memory."""
    changes = tuple((change.trained.method, tuple(change.trained.shapes.items())) for change in part.changes)
    dtypes = (tensor.dtype, part.dtype if part.changes else tensor.source.dtype)
    return dtypes, part.rows, part.width, part.unit, changes


def _needs(tensor: TensorPlan, part: Part, block: int) -> tuple[int, int]:
    """Bytes that a slab of a part takes: of its own, and of whole trained tensors."""
    if not part.width or not part.rows:
        return 0, 0
    rows = min(part.rows, slab_rows(tensor, part))
    elements = rows * part.width
    stored = tensor.origin(part)[0]
    coded = 12 if stored.coding is not None else 0
    if not part.changes:
        together = elements if coded == 0 else min(elements, block)
        return elements * itemsize(tensor.dtype) + together * ((itemsize(stored.dtype)) + coded), 0
    wide = 8 if part.dtype == "F64" else 4
    unit = part.unit * part.width
    together = min(elements, max(unit, block // unit * unit))
    # The rows, the update and, of those that are sampled, what was before.
    own = elements * itemsize(tensor.dtype) + together * (itemsize(stored.dtype) + coded + 3 * wide)
    if part.matrix.unit(1) > 1:  # in another order: once more as it is stored
        own += 2 * elements * itemsize(stored.dtype)
    shared = 0
    for change in part.changes:
        more, whole = _of_trained(change, rows, wide)
        own, shared = own + more, shared + whole
    return own, shared


def _of_trained(change: Change, rows: int, wide: int) -> tuple[int, int]:
    """Bytes of the trained tensors that a slab of so many rows reads and widens, and of those it has whole."""
    asked = {role: Asked(info.shape, info.dtype) for role, info in change.trained.tensors.items()}
    arrays = {
        role: change.trained.meant(role, one if change.trained.tensors[role].nbytes > SMALL else one.whole())
        for role, one in asked.items()
    }
    part = change.method.part(arrays, 0, rows)
    large = {role for role, info in change.trained.tensors.items() if info.nbytes > SMALL}
    shared = sum(element_count(one.shape) * wide for role, one in asked.items() if role not in large or one.is_whole)
    own = sum(
        element_count(tuple(part[role].shape)) * (wide + itemsize(change.trained.tensors[role].dtype))
        for role in large & part.keys()
        if not asked[role].is_whole
    )
    return own, shared


class Asked:
    """A tensor without memory, which notes whether it is asked for as a whole."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self._dtype = shape, dtype
        self.is_whole = False

    @property
    def dtype(self) -> np.dtype[Any]:
        return numpy_dtype(self._dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def whole(self) -> Any:
        import numpy as np

        return np.broadcast_to(np.zeros((), numpy_dtype(self._dtype)), self.shape)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.indices(len(self)) == (0, len(self), 1):
            self.is_whole = True
        return self.whole()[key]
