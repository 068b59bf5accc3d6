"""Merged mode on a graph the user brought: plain weights with the updates added, and nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.onnx._places import OpenGraph, Place
from fossil_export.onnx._signature import Slot
from fossil_export.onnx._trained import merged_rows
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._weight import round_to

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(graph: OpenGraph, editor: Editor) -> tuple[Slot, ...]:
    """Give the products of every place the merged weight; whatever else reads the old one (an embedding) keeps it."""
    for place in graph.places:
        merged = _merged(graph, place)
        made: dict[tuple[bool, str], ir.Value] = {}
        for site in graph.sites[place.label]:
            dtype = site.weight.dtype if site.weight.direct else site.activation
            key = (site.inputs_first, dtype)
            if key not in made:
                stored = round_to(merged.T if site.inputs_first else merged, dtype, f"the merged weight {place.label}")
                name = f"{place.label}.merged" + (f"_{len(made) + 1}" if made else "")
                made[key] = editor.constant(name, stored)
            site.node.replace_input_with(1, made[key])
    return ()


def makes_weights(graph: OpenGraph) -> bool:
    return True


def _merged(graph: OpenGraph, place: Place) -> Array:
    """(out, in) in float32: the base's own values plus the update, what is untouched as the graph has it."""
    whole = graph.sites[place.label][0].weight.read(slice(None)).copy()
    for piece in place.pieces:
        part = merged_rows(graph.adapter, piece, graph.base_weights[piece.module])
        whole[piece.at : piece.at + piece.count] = part
    return whole
