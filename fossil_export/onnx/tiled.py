"""Tiled mode: W' is rebuilt from W and D out of constants, which the runtime folds once, when it loads the graph.

    W' = W + T D        W as the product reads it, (in, out); D (r, out); T[j, k] = 1 where j mod r == k, else 0

The tiling is one Gemm with W as its C: every element gets a single addend, so the sum is exact before its one
rounding, any r does, and the runtime needs no room for the tiled D. Bat's formula is in methods/bat.py. The sum
is made in float32 and rounded once to the stored dtype, as the merge does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.errors import OnnxError
from fossil_export.onnx.edit import Editor
from fossil_export.onnx.plan import OnnxPlan, Target, round_to

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(plan: OnnxPlan, editor: Editor) -> None:
    """Put the sum in the place of every target's weight."""
    for target in plan.targets:
        name = f"{target.label}/tiled"
        if any(plan.adapter.trained[piece.module].form_rank is None for piece in target.pieces):
            merged = _bat(plan, editor, target, name)
        else:
            merged = _tile(plan, editor, target, name)
        for site in target.sites:
            # Only these products: a tied embedding goes on reading the base's weight.
            site.node.replace_input_with(1, merged)


def _tile(plan: OnnxPlan, editor: Editor, target: Target, name: str) -> ir.Value:
    site = target.sites[0]
    operand = site.node.inputs[1]
    values = plan.shard(target)
    round_to(values, site.weight.dtype, f"the shard of {target.label}")
    shard = editor.shard(f"{target.label}.shard", values)
    tiling = editor.tiling(target.inputs, int(shard.shape[0]))
    wide = _cast(editor, target, operand, f"{name}/Cast_in", ir.DataType.FLOAT)
    if site.inputs_first:
        added = editor.node("Gemm", [tiling, shard, wide], f"{name}/Gemm", before=site.node, shape=operand.shape)
    else:
        added = editor.node(
            "Gemm", [shard, tiling, wide], f"{name}/Gemm", before=site.node, shape=operand.shape, transA=1, transB=1
        )
    return _cast(editor, target, added, f"{name}/Cast_out", operand.dtype)


def _bat(plan: OnnxPlan, editor: Editor, target: Target, name: str) -> ir.Value:
    blocks = _blocks(plan, target)
    count, rank, _ = blocks.shape
    inputs, outputs, node = target.inputs, target.outputs, target.sites[0].node
    across = inputs // rank
    if target.sites[0].inputs_first:
        # Of the transposed block: V' = V + Bᵀ V + Bᵀ, V (in-block, out-block, r, r).
        shape: tuple[int, ...] = (across, rank, count, rank)
        values = editor.shard(f"{target.label}.shard", blocks.transpose(0, 2, 1))
    else:
        shape = (count, rank, across, rank)
        values = editor.shard(f"{target.label}.shard", blocks[:, None])
    cut = _reshape(editor, target, node.inputs[1], f"{name}/Reshape_in", shape)
    wide = _cast(editor, target, cut, f"{name}/Cast_in", ir.DataType.FLOAT)
    wide = editor.node("Transpose", [wide], f"{name}/Transpose", before=node, perm=[0, 2, 1, 3])
    order = [values, wide] if target.sites[0].inputs_first else [wide, values]
    product = editor.node("MatMul", order, f"{name}/MatMul", before=node)
    added = editor.node("Add", [wide, product], f"{name}/Add", before=node)
    added = editor.node("Add", [added, values], f"{name}/Add_shard", before=node)
    added = editor.node("Transpose", [added], f"{name}/Transpose_back", before=node, perm=[0, 2, 1, 3])
    added = _cast(editor, target, added, f"{name}/Cast_out", target.sites[0].node.inputs[1].dtype)
    whole = (inputs, outputs) if target.sites[0].inputs_first else (outputs, inputs)
    return _reshape(editor, target, added, f"{name}/Reshape", whole)


def _blocks(plan: OnnxPlan, target: Target) -> Array:
    """B (out/r, r, r) of the whole target; zeros, which change nothing, where nothing was trained."""
    shards = [plan.adapter.trained[piece.module] for piece in target.pieces]
    rank = shards[0].rank
    whole = np.zeros((target.outputs // rank, rank, rank), np.float32)
    for piece, shard in zip(target.pieces, shards, strict=True):
        if (
            shard.rank != rank
            or shard.method != "bat"
            or target.outputs % rank
            or piece.at % rank
            or piece.start % rank
        ):
            raise OnnxError(
                f"{plan.graph}: the blocks of {piece.module} do not fit the packed weight {target.label}; "
                "use --mode merged"
            )
        values = np.asarray(plan.adapter.array(shard.tensors["B"]), np.float32)
        start, blocks = piece.start // rank, piece.count // rank
        whole[piece.at // rank : piece.at // rank + blocks] = values[start : start + blocks]
    return whole


def _reshape(editor: Editor, target: Target, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
    return editor.node("Reshape", [value, editor.integers(shape)], name, before=target.sites[0].node, shape=shape)


def _cast(editor: Editor, target: Target, value: ir.Value, name: str, dtype: Any) -> ir.Value:
    if value.dtype == dtype:
        return value
    return editor.node(
        "Cast", [value], name, before=target.sites[0].node, shape=value.shape, dtype=dtype, to=int(dtype)
    )
