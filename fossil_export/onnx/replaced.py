"""Merged mode on a graph the user brought: plain weights with the shards added, and nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.errors import OnnxError
from fossil_export.methods import METHODS
from fossil_export.onnx.edit import Editor
from fossil_export.onnx.plan import OnnxPlan, Target, round_to

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(plan: OnnxPlan, editor: Editor) -> None:
    """Replace the initializer of every target by the merged weight; the base's data file keeps the rest."""
    for target in plan.targets:
        weight = target.sites[0].weight
        if weight.dtype == "DOUBLE":
            raise OnnxError(f"{plan.graph}: {target.label} is stored as DOUBLE; use --mode tiled or a float32 graph")
        merged = _merged(plan, target)
        stored = round_to(merged.T if weight.transposed else merged, weight.dtype, f"the merged weight {target.label}")
        value = editor.shard(f"{target.label}.merged", stored)
        if weight.direct:
            for site in target.sites:
                site.node.replace_input_with(1, value)
        else:
            first = weight.value
            readers = {id(node): node for site in target.sites for node in _readers(site.node.inputs[1], first)}
            for node in readers.values():
                node.replace_input_with(list(node.inputs).index(first), value)


def _merged(plan: OnnxPlan, target: Target) -> Array:
    """(out, in) in float32: the base's own values plus the update, what is untouched as the graph has it."""
    whole = target.sites[0].weight.read(slice(None)).copy()
    for piece in target.pieces:
        base = plan.base_weights[piece.module]
        rows = slice(piece.start, piece.start + piece.count)
        shard = plan.adapter.shards[piece.module]
        part = np.array(base[rows], np.float32)
        METHODS[shard.variant].merge_rows(part, np.asarray(plan.adapter.array(shard.tensor), np.float32), piece.start)
        whole[piece.at : piece.at + piece.count] = part
    return whole


def _readers(value: ir.Value, initializer: ir.Value) -> list[ir.Node]:
    """The nodes of the chain from `initializer` to `value` that read the initializer itself."""
    node = value.producer()
    if node is None:
        return []
    if any(operand is initializer for operand in node.inputs):
        return [node]
    return _readers(node.inputs[0], initializer)
