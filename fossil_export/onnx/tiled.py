"""Tiled mode: W' is rebuilt from W and D out of constants, which the runtime folds once, when it loads the graph.

    W'[j, o] = W[j, o] + D[j mod r, o]        W as the product reads it, (in, out); D (r, out)

W cut into (in/r, r, out) is the same bytes, so the initializer is declared once more with that shape over the
same range of the base's data file, and D is added by broadcasting. Bat's formula is in methods/bat.py. Added in
float32 and rounded once to the stored dtype, as the merge does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.errors import OnnxError
from fossil_export.onnx.edit import Editor
from fossil_export.onnx.plan import OnnxPlan, Target
from fossil_export.onnx.weight import stored

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(plan: OnnxPlan, editor: Editor) -> None:
    """Put the sum in the place of every target's weight."""
    for target in plan.targets:
        first = target.sites[0]
        name = f"{target.label}/tiled"
        if any(plan.adapter.shards[piece.module].variant == "bat" for piece in target.pieces):
            merged = _bat(plan, editor, target, name)
        else:
            merged = _tile(plan, editor, target, name)
        for site in target.sites:
            # Only these products: a tied embedding goes on reading the base's weight.
            site.node.replace_input_with(1, merged)
        assert first.node.inputs[1] is merged


def _tile(plan: OnnxPlan, editor: Editor, target: Target, name: str) -> ir.Value:
    shard = plan.shard(target)
    rank, outputs = shard.shape
    inputs, by_rows = target.inputs, target.sites[0].weight.transposed  # rows of (in, out) are inputs
    times, rest = divmod(inputs, rank)
    body, tail = times * rank, []
    if by_rows:
        values = editor.shard(f"{target.label}.shard", shard)
        parts = [_sum(editor, target, name, (0, body), (times, rank, outputs), values)]
        parts[0] = _reshape(editor, target, parts[0], f"{name}/Reshape", (body, outputs))
        if rest:
            cut = editor.shard(f"{target.label}.shard_rest", shard[:rest])
            tail = [_sum(editor, target, f"{name}/rest", (body, inputs), (rest, outputs), cut)]
        return _joined(editor, target, [*parts, *tail], name, 0)
    if rest == 0:
        values = editor.shard(f"{target.label}.shard", shard.T[:, None, :])
        added = _sum(editor, target, name, (0, outputs), (outputs, times, rank), values)
        return _reshape(editor, target, added, f"{name}/Reshape", (outputs, inputs))
    # Rows are outputs and r does not divide them: there is no such view, so D itself is repeated and cut.
    node = target.sites[0].node
    values = editor.shard(f"{target.label}.shard", shard.T)
    wide = editor.node("Tile", [values, editor.integers([1, times + 1])], f"{name}/Tile", before=node)
    cut = [editor.integers([value]) for value in (0, inputs, 1)]
    wide = editor.node("Slice", [wide, *cut], f"{name}/Slice", before=node, shape=(outputs, inputs))
    return _sum(editor, target, name, (0, outputs), (outputs, inputs), wide)


def _bat(plan: OnnxPlan, editor: Editor, target: Target, name: str) -> ir.Value:
    blocks = _blocks(plan, target)
    count, rank, _ = blocks.shape
    inputs, outputs, node = target.inputs, target.outputs, target.sites[0].node
    across = inputs // rank
    if target.sites[0].weight.transposed:
        # Of the transposed block: V' = V + Bᵀ V + Bᵀ, V (in-block, out-block, r, r).
        shape: tuple[int, ...] = (across, rank, count, rank)
        values = editor.shard(f"{target.label}.shard", blocks.transpose(0, 2, 1))
        cut = _view(editor, target, f"{name}/weight", (0, inputs), shape)
    else:
        shape = (count, rank, across, rank)
        values = editor.shard(f"{target.label}.shard", blocks[:, None])
        cut = _view(editor, target, f"{name}/weight", (0, outputs), shape)
    wide = _cast(editor, target, cut, f"{name}/Cast_in", ir.DataType.FLOAT)
    wide = editor.node("Transpose", [wide], f"{name}/Transpose", before=node, perm=[0, 2, 1, 3])
    order = [values, wide] if target.sites[0].weight.transposed else [wide, values]
    product = editor.node("MatMul", order, f"{name}/MatMul", before=node)
    added = editor.node("Add", [wide, product], f"{name}/Add", before=node)
    added = editor.node("Add", [added, values], f"{name}/Add_shard", before=node)
    added = editor.node("Transpose", [added], f"{name}/Transpose_back", before=node, perm=[0, 2, 1, 3])
    added = _cast(editor, target, added, f"{name}/Cast_out", target.sites[0].node.inputs[1].dtype)
    whole = (inputs, outputs) if target.sites[0].weight.transposed else (outputs, inputs)
    return _reshape(editor, target, added, f"{name}/Reshape", whole)


def _blocks(plan: OnnxPlan, target: Target) -> Array:
    """B (out/r, r, r) of the whole target; zeros, which change nothing, where nothing was trained."""
    shards = [plan.adapter.shards[piece.module] for piece in target.pieces]
    rank = shards[0].rank
    whole = np.zeros((target.outputs // rank, rank, rank), np.float32)
    for piece, shard in zip(target.pieces, shards, strict=True):
        if (
            shard.rank != rank
            or shard.variant != "bat"
            or target.outputs % rank
            or piece.at % rank
            or piece.start % rank
        ):
            raise OnnxError(
                f"{plan.graph}: the blocks of {piece.module} do not fit the packed weight {target.label}; "
                "use --mode merged"
            )
        values = np.asarray(plan.adapter.array(shard.tensor), np.float32)
        start, blocks = piece.start // rank, piece.count // rank
        whole[piece.at // rank : piece.at // rank + blocks] = values[start : start + blocks]
    return whole


def _sum(
    editor: Editor, target: Target, name: str, rows: tuple[int, int], shape: tuple[int, ...], shard: ir.Value
) -> ir.Value:
    """Rows of the weight in `shape` plus `shard`, added in float32 and rounded to the weight's dtype."""
    weight = _view(editor, target, f"{name}/weight", rows, shape)
    wide = _cast(editor, target, weight, f"{name}/Cast_in", ir.DataType.FLOAT)
    added = editor.node("Add", [wide, shard], f"{name}/Add", before=target.sites[0].node, shape=shape)
    return _cast(editor, target, added, f"{name}/Cast_out", weight.dtype)


def _view(editor: Editor, target: Target, name: str, rows: tuple[int, int], shape: tuple[int, ...]) -> ir.Value:
    """Rows [start, stop) of the weight as the product reads it, in another shape: the same bytes where it can be."""
    site = target.sites[0]
    operand = site.node.inputs[1]
    if not site.weight.direct:
        node = site.node
        start, stop = rows
        whole = site.weight.inputs if site.weight.transposed else site.weight.outputs
        if (start, stop) != (0, whole):
            cut = [editor.integers([value]) for value in (start, stop, 0)]
            operand = editor.node("Slice", [operand, *cut], f"{name}/Slice", before=node)
        return editor.node("Reshape", [operand, editor.integers(shape)], f"{name}/Reshape", before=node, shape=shape)
    tensor = operand.const_value
    if isinstance(tensor, ir.ExternalTensor):
        size = tensor.nbytes // int(tensor.shape[0])
        view: Any = ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + rows[0] * size,
            (rows[1] - rows[0]) * size,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
    else:
        view = ir.Tensor(stored(tensor)[rows[0] : rows[1]].reshape(shape), tensor.dtype, name=name)
    return editor.initializer(name, view)


def _joined(editor: Editor, target: Target, parts: list[ir.Value], name: str, axis: int) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    shape = (target.inputs, target.outputs)
    return editor.node("Concat", parts, f"{name}/Concat", before=target.sites[0].node, shape=shape, axis=axis)


def _reshape(editor: Editor, target: Target, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
    return editor.node("Reshape", [value, editor.integers(shape)], name, before=target.sites[0].node, shape=shape)


def _cast(editor: Editor, target: Target, value: ir.Value, name: str, dtype: Any) -> ir.Value:
    if value.dtype == dtype:
        return value
    return editor.node(
        "Cast", [value], name, before=target.sites[0].node, shape=value.shape, dtype=dtype, to=int(dtype)
    )
