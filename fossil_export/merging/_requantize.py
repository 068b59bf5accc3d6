"""A merge that keeps the base's quantization: touched weights are quantized again, all else stays byte for byte.

What is written has the header, index and config of the base. A weight that changes is made of its dequantized values in
float32 and quantized once (`Encoder.encode`); how much of the update that leaves is measured on all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._coding import BLOCK, CodedRows
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import MergeError, listed
from fossil_export.merging._change import Part
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._quantized import quantization
from fossil_export.merging._survival import Survival, measure

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

AT_ONCE = 1 << 21
"""Elements that are quantized at a time, if the format lets them be apart."""

LEAST = 0.5
"""Share of the update that must be left, if the user does not say."""


def as_stored(base: Checkpoint, given: Checkpoint) -> Checkpoint:
    """The base with its quantized tensors. Raises MergeError if it is not quantized, or is another than the one `given`
    (layers are repeated, or taken as training saw them)."""
    if base.quantized is None and (unread := quantization(base)):
        raise MergeError(f"{base.location}: cannot be quantized again; {unread}")
    if base.quantized is None:
        raise MergeError(
            f"{base.location}: is not quantized, so nothing can be quantized again; leave out --requantize"
        )
    if base is not given:
        raise MergeError(f"{base.location}: has repeated layers, which are not quantized again; leave out --requantize")
    return base.quantized.stored


def stored_plans(base: Checkpoint, plans: Mapping[str, TensorPlan]) -> dict[str, list[TensorPlan]]:
    """The tensors of each file as the base stores them, for the `plans` of the weights; raises MergeError if its format
    cannot be written."""
    assert base.quantized is not None
    weights = {info.name: one for one in base.tensors.values() if one.coding for info in one.coding.stored}
    held = {one.name for one in weights.values()} | base.quantized.stored.tensors.keys()
    if any(plan.action != "copy" and name not in held for name, plan in plans.items()):
        raise _not_written(base)  # not under its own name
    found: dict[str, list[TensorPlan]] = {}
    for header in base.quantized.stored.files:
        tensors = found.setdefault(header.output_name, [])
        for info in header.tensors:
            weight = weights.get(info.name)
            tensors.append(
                plans.get(info.name) or _copied(info) if weight is None else _encoded(info, plans[weight.name], base)
            )
    return found


def _copied(info: TensorInfo) -> TensorPlan:
    return TensorPlan(info.name, info.dtype, info.shape, info)


def _encoded(info: TensorInfo, weight: TensorPlan, base: Checkpoint) -> TensorPlan:
    """One of the tensors that hold a quantized weight."""
    if weight.action == "dequantize":
        return _copied(info)
    coded = base.tensors[weight.name]
    assert base.quantized is not None
    if not (hasattr(coded.coding, "encode") or hasattr(coded.coding, "encoder")):
        raise _not_written(base)
    if weight.shape != coded.shape:
        raise MergeError(
            f"{base.location}: {weight.name} {list(coded.shape)} becomes {list(weight.shape)}, which its quantized "
            "form has no room for; leave out --requantize"
        )
    return replace(_copied(info), encodes=replace(weight, dtype="F32"), coded=coded)


def _not_written(base: Checkpoint) -> MergeError:
    assert base.quantized is not None
    return MergeError(
        f"{base.location}: weights of {base.quantized.format} are read and not written; leave out --requantize, "
        "and quantize the merged model with the library that made the base"
    )


def refuse_added(base: Checkpoint, added: Iterable[TensorPlan]) -> None:
    """Raise MergeError for a matrix that the base does not have: by its config it may be a quantized one."""
    for tensor in added:
        if len(tensor.shape) > 1:
            raise MergeError(
                f"{base.location}: has no {tensor.name}, which the adapter brings or parts from the embedding; the "
                "base's config says of quantized weights only which there are now; leave out --requantize"
            )


def ranges(coded: TensorInfo, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The rows of a quantized weight's matrix that are quantized together: about `AT_ONCE` elements, if its coding has
    units of rows (`Divisible`) and none of the `parts` that change or are brought is in two of them; else all rows."""
    coding: Any = coded.coding
    count = element_count(coded.shape)
    unit = getattr(coding, "unit", None)
    if unit is None:
        return [(0, count // coding.width)]
    unit *= coding.width
    whole = sorted((part.first, part.last) for part in parts if part.changes or part.piece is not None)
    found, start, at = [], 0, 0
    for stop in range(unit, count, unit):
        while at < len(whole) and whole[at][1] <= stop:
            at += 1
        inside = at < len(whole) and whole[at][0] < stop
        if not inside and stop - start + unit > AT_ONCE:
            found.append((start // coding.width, stop // coding.width))
            start = stop
    return [*found, (start // coding.width, count // coding.width)]


def part_of(coded: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of a quantized weight's matrix, one of its `ranges`, as a weight."""
    coding: Any = coded.coding
    if (start, stop) == (0, element_count(coded.shape) // coding.width):
        return coded
    return replace(coded, shape=(stop - start, coding.width), coding=coding.part(start, stop))


@dataclass(frozen=True)
class Encoded:
    """What a weight was encoded to, by stored tensor, and what is left of its update."""

    tensors: Mapping[str, Array]
    survival: Survival


def encode(coded: TensorInfo, before: CodedRows | None, matrix: Array, codes_of: ReadRows) -> Encoded:
    """Quantize `matrix` (rows, width) in float32 as the weight `coded`, whose values were `before` (None if others took
    their place, so that there is no update to measure); stored tensors are read by `codes_of`. Raises CheckpointError
    as decoding does."""
    coding: Any = coded.coding
    encoder = coding.encoder(codes_of) if hasattr(coding, "encoder") else coding
    tensors: dict[str, Array] = dict(encoder.encode(matrix))
    for info in coding.stored:
        assert tensors[info.name].shape == info.shape, info.name
    if before is None:
        return Encoded(tensors, Survival())

    def rows_of(info: TensorInfo, start: int, stop: int) -> Array:
        return tensors[info.name].reshape(info.shape)[start:stop]

    own = coding.written(tensors) if hasattr(coding, "written") else coding
    after = CodedRows(replace(coded, shape=matrix.shape, coding=own), rows_of, 0, len(matrix))
    total, step = Survival(), max(1, BLOCK // matrix.shape[1])
    import numpy as np

    for start in range(0, len(matrix), step):
        stop = min(start + step, len(matrix))
        was = before[start:stop].astype(np.float32)
        total += measure(was, matrix[start:stop] - was, after[start:stop].astype(np.float32))
    return Encoded(tensors, total)


def refuse_lost(plan: MergePlan, survival: Mapping[str, Survival]) -> None:
    """Raise MergeError if quantizing again left less of the update than the plan asks for."""
    if plan.min_survival is None:
        return
    names = {tensor.name for tensor in plan.tensors if tensor.encodes is not None}
    own = {name: one for name, one in survival.items() if name in names}
    share = sum(own.values(), Survival()).survived
    if share is not None and share < plan.min_survival:
        worst = sorted(own, key=lambda name: own[name].survived or 0.0)
        raise MergeError(
            f"{plan.base_name}: quantized again, the weights keep {share:.1%} of the update (least in "
            f"{listed(worst, 3)}), less than the {plan.min_survival:.1%} that is asked for; leave out --requantize, "
            "serve the adapter beside the quantized model, or take it with --min-survival 0"
        )
