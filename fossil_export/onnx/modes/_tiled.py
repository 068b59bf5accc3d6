"""Tiled mode: W' is rebuilt from W and D out of constants, which the runtime folds once, when it loads the graph.

    W' = W + T D        W as the product reads it, (in, out); D (r, out); T[j, k] = 1 where j mod r == k, else 0

The tiling is one Gemm with W as its C: every element gets a single addend, so the sum is exact before its one
rounding, any r does, and the runtime needs no room for the tiled D. A method whose `down` has weights of its own has
these in the place of T. Bat's formula is in methods/_bat.py. The sum is made in float32 and rounded once to the stored
dtype, as the merge does.
"""

from __future__ import annotations

import onnx_ir as ir

from fossil_export.methods import Tiling
from fossil_export.onnx._places import OpenGraph, Place
from fossil_export.onnx._signature import Slot
from fossil_export.onnx._trained import blocks, has_blocks
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._sites import Site
from fossil_export.onnx.graph._weight import round_to


def rewrite(graph: OpenGraph, editor: Editor) -> tuple[Slot, ...]:
    """Put the sum in the place of every trained weight."""
    for place in graph.places:
        made = _bat if has_blocks(graph.adapter, place.pieces) else _tile
        merged = made(graph, editor, place, f"{place.label}/tiled")
        for site in graph.sites[place.label]:
            # Only these products: a tied embedding goes on reading the base's weight.
            site.node.replace_input_with(1, merged)
    return ()


def _tile(graph: OpenGraph, editor: Editor, place: Place, name: str) -> ir.Value:
    site = graph.sites[place.label][0]
    operand = site.node.inputs[1]
    branch = graph.branch(place)
    tiled = isinstance(branch.down, Tiling)
    round_to(branch.up, site.weight.dtype, f"the {'shard' if tiled else 'lora_B'} of {place.label}")
    trained = editor.constant(f"{place.label}.{'shard' if tiled else 'lora_B'}", branch.up)
    if isinstance(branch.down, Tiling):
        tiling = editor.tiling(place.inputs, int(trained.shape[0]))
    else:
        tiling = editor.constant(f"{place.label}.lora_A", branch.down.T)
    wide = editor.cast(operand, ir.DataType.FLOAT, f"{name}/Cast_in", before=site.node)
    if site.inputs_first:
        added = editor.node("Gemm", [tiling, trained, wide], f"{name}/Gemm", before=site.node, shape=operand.shape)
    else:
        added = editor.node(
            "Gemm", [trained, tiling, wide], f"{name}/Gemm", before=site.node, shape=operand.shape, transA=1, transB=1
        )
    return editor.cast(added, operand.dtype, f"{name}/Cast_out", before=site.node)


def _bat(graph: OpenGraph, editor: Editor, place: Place, name: str) -> ir.Value:
    trained = blocks(graph.adapter, place.pieces, place.outputs, place.label, graph.path)
    site = graph.sites[place.label][0]
    count, rank, _ = trained.shape
    inputs, outputs, node = place.inputs, place.outputs, site.node
    across = inputs // rank
    if site.inputs_first:
        # Of the transposed block: V' = V + Bᵀ V + Bᵀ, V (in-block, out-block, r, r).
        shape: tuple[int, ...] = (across, rank, count, rank)
        values = editor.constant(f"{place.label}.shard", trained.transpose(0, 2, 1))
    else:
        shape = (count, rank, across, rank)
        values = editor.constant(f"{place.label}.shard", trained[:, None])
    cut = _reshape(editor, site, node.inputs[1], f"{name}/Reshape_in", shape)
    wide = editor.cast(cut, ir.DataType.FLOAT, f"{name}/Cast_in", before=site.node)
    wide = editor.node("Transpose", [wide], f"{name}/Transpose", before=node, perm=[0, 2, 1, 3])
    order = [values, wide] if site.inputs_first else [wide, values]
    product = editor.node("MatMul", order, f"{name}/MatMul", before=node)
    added = editor.node("Add", [wide, product], f"{name}/Add", before=node)
    added = editor.node("Add", [added, values], f"{name}/Add_shard", before=node)
    added = editor.node("Transpose", [added], f"{name}/Transpose_back", before=node, perm=[0, 2, 1, 3])
    added = editor.cast(added, node.inputs[1].dtype, f"{name}/Cast_out", before=site.node)
    whole = (inputs, outputs) if site.inputs_first else (outputs, inputs)
    return _reshape(editor, site, added, f"{name}/Reshape", whole)


def _reshape(editor: Editor, site: Site, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
    return editor.node("Reshape", [value, editor.integers(shape)], name, before=site.node, shape=shape)
