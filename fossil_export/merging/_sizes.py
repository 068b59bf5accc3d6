"""How large what an adapter changes is beside the weights that it changes: ‖ΔW‖ and ‖W‖, Frobenius norms.

Of an update with a low-rank form, ΔW = U A, the norm comes from the Gram matrices, ‖ΔW‖² = Σ (UᵀU) ∘ (A Aᵀ), without
ΔW; of any other from its rows. Weights are read by rows, at most `LIMIT` bytes of each: of larger ones a part of the
rows, evenly spread, stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fossil_export._progress import counted
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import BITS, FLOATS, element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._source import is_read_in_place
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.checkpoints.quantized._trained_on import OfConv1d
from fossil_export.errors import FossilExportError
from fossil_export.merging._change import Change, Part
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._seen_weights import seen_weight
from fossil_export.methods import Tiling

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

LIMIT = 4 << 20
"""Bytes of a weight that are read; less of each if there are many (`TOTAL`)."""

TOTAL = 1 << 30
"""Bytes of all weights that are read."""

CUTS = 16
"""Places in a weight that its rows are taken from, if not all are read."""


@dataclass(frozen=True)
class Size:
    """‖ΔW‖ and ‖W‖ of one weight; None for what was not to be had. `share` is that of its rows that were read;
    `quantization` is ‖W − W'‖, if training saw it quantized, as W'."""

    update: float | None
    weight: float | None
    share: float = 1.0
    quantization: float | None = None

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        if self.update is None or not self.weight or not math.isfinite(self.update / self.weight):
            return None
        return self.update / self.weight

    def beside(self, other: Size) -> Size:
        """Of two weights of one module, such as experts, together."""
        pairs = (
            (self.update, other.update),
            (self.weight, other.weight),
            (self.quantization, other.quantization),
        )
        update, weight, moved = (None if None in pair else math.hypot(*(one or 0.0 for one in pair)) for pair in pairs)
        return Size(update, weight, min(self.share, other.share), moved)


def sizes_of(plan: MergePlan, most: int | None = None, far: bool = False) -> dict[str, Size]:
    """By module, and by name for a tensor that comes whole. Of a base, or an adapter, that is not on this machine no
    values are read, unless `far` says that those of a base which is read in its place are wanted. `most` bytes are read
    of a weight (default: `LIMIT`)."""
    changed = [tensor for tensor in plan.tensors if tensor.action in ("merge", "replace")]
    count = sum(len(tensor.changes) or 1 for tensor in changed)
    limit = min(LIMIT if most is None else most, TOTAL // max(1, count))
    in_place = far and plan.base.can_stay and is_read_in_place(plan.base.home)
    base_is_here = in_place or all(header.path.is_file() for header in plan.base.files)
    found: dict[str, Size] = {}
    for tensor in counted(changed, "measuring the updates", len(changed), "tensors"):
        for part in tensor.parts:
            for change in part.changes:
                if plan.adapters[change.adapter].is_here:
                    size, module = _of_change(plan, tensor, part, change, limit, base_is_here), change.trained.module
                    found[module] = found[module].beside(size) if module in found else size
        if tensor.action == "replace" and tensor.owner is not None and plan.adapters[tensor.owner].is_here:
            found[tensor.name] = _of_replaced(plan, tensor, limit, base_is_here)
    found |= {module: _of_rows(plan, module, tensor, base_is_here) for module, tensor in plan.rows.items()}
    return found


def _of_rows(plan: MergePlan, module: str, tensor: TensorPlan, base_is_here: bool) -> Size:
    """Of rows that take the place of the base's: what they differ by, beside the norm of those rows."""
    import numpy as np

    difference = weight = 0.0
    own = {info.name for adapter in plan.adapters for info in _tensors(adapter, module)}
    for piece in tensor.pieces:
        if piece.source.name not in own:
            continue
        if not base_is_here or not plan.adapters[piece.adapter].is_here or tensor.owner is not None:
            return Size(None, None)
        width = tensor.shape[-1]
        first, last = piece.first // width, piece.last // width
        new = plan.adapters[piece.adapter].array(piece.source).astype(np.float32).reshape(-1, width)
        old = _read(plan, tensor.source, None, first, last).astype(np.float32).reshape(-1, width)
        difference += _square(new - old)
        weight += _square(old)
    return Size(math.sqrt(difference), math.sqrt(weight))


def _tensors(adapter: Adapter, module: str) -> Iterable[TensorInfo]:
    return adapter.trained[module].tensors.values() if module in adapter.trained else ()


def _of_change(plan: MergePlan, tensor: TensorPlan, part: Part, change: Change, limit: int, base_is_here: bool) -> Size:
    import numpy as np

    adapter = plan.adapters[change.adapter]
    trained, method, (outputs, inputs) = change.trained, change.method, change.into.shape
    arrays = {
        role: array if array.dtype.kind in "iu" else array.astype(np.float64)
        for role, info in trained.tensors.items()
        for array in (trained.meant(role, adapter.array(info))[:],)
    }
    update = _from_form(arrays, change, outputs, inputs)
    source, owner = tensor.origin(part)
    numbers = change.numbers(part.dtype, owner is not None)
    if owner is None and not base_is_here:
        return Size(update, None)

    def rows_of(info: TensorInfo, start: int, stop: int) -> Array:
        return _read(plan, info, owner, start, stop)

    of_update = of_weight = of_quantization = 0.0
    read = 0
    seen = _seen(plan, change, owner)
    unit = change.into.unit(trained.block_rows)
    bits = BITS[source.dtype]
    for start, stop in _slices(outputs, unit, limit * 8 // max(1, inputs * bits)):
        weight = part.matrix_rows(rows_of, start, stop)[:].astype(np.float32)
        of_weight += _square(weight)
        read += stop - start
        if seen is not None:
            pair = [one.read(rows_of, start, stop)[:].astype(np.float32) for one in seen]
            of_quantization += _square(pair[0] - pair[1])
        if update is None:
            own = method.part(arrays, start, stop)
            of_update += _square(method.update(weight.astype(np.float64), own, numbers, 0))
    share = read / outputs
    size = math.sqrt(of_update / share) if update is None else update
    moved = math.sqrt(of_quantization / share) if seen is not None else None
    return Size(size * abs(change.weight), math.sqrt(of_weight / share), share, moved)


def _seen(plan: MergePlan, change: Change, owner: int | None) -> tuple[Matrix, Matrix] | None:
    """The matrix that a change goes into as the base has it, and as training saw it if that quantized it.

    Its scales are left as they are, so that rows can be had without the rest.
    """
    info = change.into.stored[0]
    how = plan.trained_on
    stored = info.coding.stored[0] if info.coding is not None else info
    if owner is not None or how is None or stored.name not in plan.seen.tensors or stored.shape != info.shape:
        return None
    turned = isinstance(plan.seen.tensors[stored.name].coding, OfConv1d)
    seen = seen_weight(stored, replace(how, double_quant=False), turned)
    return change.into.moved(stored), change.into.moved(seen)


def _from_form(arrays: Mapping[str, Array], change: Change, outputs: int, inputs: int) -> float | None:
    """‖ΔW‖ by the low-rank form; None without one."""
    import numpy as np

    form = change.method.low_rank(arrays, change.trained.numbers, outputs)
    if form is None:
        return None
    up = np.asarray(form.up)
    if isinstance(form.down, Tiling):  # the rows of A are ones in columns of their own
        counts = np.bincount(np.arange(inputs) % form.rank, minlength=form.rank)
        return math.sqrt(float(((up * up).sum(axis=0) * counts).sum()))
    down = np.asarray(form.down)
    square = float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(max(0.0, square)) if square == square else square


def _of_replaced(plan: MergePlan, tensor: TensorPlan, limit: int, base_is_here: bool) -> Size:
    """Of a tensor that comes whole: what it differs by from the base's of that name."""
    import numpy as np

    old, new = plan.base.tensors[tensor.name], tensor.source
    if not base_is_here or old.shape != new.shape or not {old.dtype, new.dtype} <= set(FLOATS) or not new.shape:
        return Size(None, None)
    rows = new.shape[0]
    width = max(1, element_count(new.shape[1:]))
    difference = weight = 0.0
    read = 0
    for start, stop in _slices(rows, 1, limit * 8 // (width * BITS[old.dtype])):
        own = _read(plan, old, None, start, stop).astype(np.float32)
        weight += _square(own)
        difference += _square(_read(plan, new, tensor.owner, start, stop).astype(np.float32) - own)
        read += stop - start
    return Size(math.sqrt(difference * rows / read), math.sqrt(weight * rows / read), read / rows)


def _slices(rows: int, unit: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, of whole units: all of them if there are no more than `most`, else evenly spread ones."""
    units = -(-rows // unit)
    wanted = max(1, most // unit)
    if wanted >= units:
        yield 0, rows
        return
    cuts = min(CUTS, wanted)
    each = wanted // cuts
    for cut in range(cuts):
        first = cut * (units - each) // max(1, cuts - 1) if cuts > 1 else (units - each) // 2
        yield first * unit, min((first + each) * unit, rows)


def _read(plan: MergePlan, info: TensorInfo, owner: int | None, start: int, stop: int) -> Array:
    """Rows [start, stop) of a stored tensor's first axis."""
    if owner is not None:
        return plan.adapters[owner].array(info, start, stop)
    if info.offset is None and info.coding is None:
        raise FossilExportError(f"{info.path}: {info.name} cannot be read by parts")
    found: Array = read_rows(info, start, stop, partial(view_rows, plan.base.home))[:]
    return found


def _square(values: Array) -> float:
    """The sum of the squares: each piece in the array's own dtype, their sum in float64."""
    import numpy as np

    flat = np.ascontiguousarray(values).reshape(-1)
    return math.fsum(float(np.dot(piece, piece)) for piece in np.array_split(flat, max(1, len(flat) >> 16)))
