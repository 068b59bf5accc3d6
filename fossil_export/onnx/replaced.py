"""Merged mode on a graph the user brought: plain weights with the shards added, and nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.methods import METHODS
from fossil_export.onnx.edit import Editor
from fossil_export.onnx.plan import OnnxPlan, Target, round_to

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(plan: OnnxPlan, editor: Editor) -> None:
    """Give the products of every target the merged weight; whatever else reads the old one (an embedding) keeps it."""
    for target in plan.targets:
        merged = _merged(plan, target)
        made: dict[tuple[bool, str], ir.Value] = {}
        for site in target.sites:
            dtype = site.weight.dtype if site.weight.direct else site.activation
            key = (site.inputs_first, dtype)
            if key not in made:
                stored = round_to(merged.T if site.inputs_first else merged, dtype, f"the merged weight {target.label}")
                name = f"{target.label}.merged" + (f"_{len(made) + 1}" if made else "")
                made[key] = editor.shard(name, stored)
            site.node.replace_input_with(1, made[key])


def _merged(plan: OnnxPlan, target: Target) -> Array:
    """(out, in) in float32: the base's own values plus the update, what is untouched as the graph has it."""
    whole = target.sites[0].weight.read(slice(None)).copy()
    for piece in target.pieces:
        base = plan.base_weights[piece.module]
        rows = slice(piece.start, piece.start + piece.count)
        trained = plan.adapter.trained[piece.module]
        part = np.array(base[rows], np.float32)
        arrays = {role: np.asarray(array, np.float32) for role, array in plan.adapter.arrays(piece.module).items()}
        METHODS[trained.method].add(part, arrays, trained.numbers, piece.start)
        whole[piece.at : piece.at + piece.count] = part
    return whole
