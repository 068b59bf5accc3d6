"""Swappable mode: the branches of fused mode, with the trained tensors as optional inputs of any rank.

An adapter file gives the inputs their values while a session runs. Without one the branches are not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fossil_export.onnx._places import OpenGraph, Place
from fossil_export.onnx._signature import Slot
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._sites import Site


def rewrite(graph: OpenGraph, editor: Editor) -> list[Slot]:
    """One input a place. The default, of rank 0, means "no adapter": the branches are not run."""
    inputs: dict[str, ir.Value] = {}
    forms: dict[str, _Form] = {}
    groups: dict[tuple[int, str], list[tuple[Place, Site]]] = {}
    slots = []
    for place, site in graph.in_order():
        if place.label not in inputs:
            name, dtype = f"{place.label}.shard", ir.DataType[site.activation]
            null = ir.Tensor(np.zeros((0, place.outputs), dtype.numpy()), dtype, name=name)
            value = editor.initializer(name, null)
            value.shape = ir.Shape([f"rank_{place.kind}", place.outputs])
            editor.graph.inputs.append(value)
            inputs[place.label] = value
            slots.append(Slot(name, place.kind, site.activation, place.inputs, place.outputs, place.pieces))
        groups.setdefault((id(site.x), place.kind), []).append((place, site))
    first = next(iter(editor.graph))
    for members in groups.values():
        place = members[0][0]
        if place.kind not in forms:
            forms[place.kind] = _form(editor, first, inputs[place.label], place)
        _branch(editor, members, inputs, forms[place.kind])
    return slots


@dataclass(frozen=True)
class _Form:
    """For inputs of one width and the rank that is loaded: is there one, what to add to x, what to cut it into."""

    loaded: ir.Value
    pads: ir.Value
    shape: ir.Value


def _form(editor: Editor, before: ir.Node, given: ir.Value, place: Place) -> _Form:
    name = f"fossil/{place.kind}"
    kind = ir.DataType.INT64
    rank = editor.node("Shape", [given], f"{name}/rank", before=before, shape=[1], dtype=kind, start=0, end=1)
    none, one = editor.integers([0]), editor.integers([1])
    boolean = ir.DataType.BOOL
    loaded = editor.node("Greater", [rank, none], f"{name}/is_loaded", before=before, shape=[1], dtype=boolean)
    divisor = editor.node("Max", [rank, one], f"{name}/divisor", before=before, shape=[1])
    top = editor.node("Add", [rank, editor.integers([place.inputs - 1])], f"{name}/Add", before=before, shape=[1])
    times = editor.node("Div", [top, divisor], f"{name}/times", before=before, shape=[1])
    full = editor.node("Mul", [times, rank], f"{name}/padded_width", before=before, shape=[1])
    width = editor.integers([place.inputs])
    missing = editor.node("Sub", [full, width], f"{name}/missing", before=before, shape=[1])
    pads = [editor.integers([0, 0, 0]), missing]
    shape = [editor.integers([-1]), times, rank]
    return _Form(
        loaded,
        editor.node("Concat", pads, f"{name}/pads", before=before, shape=[4], axis=0),
        editor.node("Concat", shape, f"{name}/shape", before=before, shape=[3], axis=0),
    )


def _branch(editor: Editor, members: list[tuple[Place, Site]], inputs: Mapping[str, ir.Value], form: _Form) -> None:
    """One If for all products of one x: their sums with S(x) D where an adapter is loaded, else they themselves."""
    place, site = members[0]
    name, rank = f"{site.x.name}/fossil", f"rank_{place.kind}"
    taken: list[ir.Node] = []
    flat = editor.flat(site.x, f"{name}/flat", place.inputs, into=taken)
    padded = editor.node("Pad", [flat, form.pads], f"{name}/Pad", into=taken, shape=[None, None])
    cut = editor.node("Reshape", [padded, form.shape], f"{name}/Reshape", into=taken, shape=[None, None, rank])
    axis = editor.integers([1])
    summed = editor.node("ReduceSum", [cut, axis], f"{name}/ReduceSum", into=taken, shape=[None, rank], keepdims=0)
    passed: list[ir.Node] = []
    within, without = [], []
    for one, product in members:
        label, y = f"{one.label}/fossil", product.y
        plain = editor.flat(y, f"{label}/flat", one.outputs, into=taken)
        added = editor.node("Gemm", [summed, inputs[one.label], plain], f"{label}/Gemm", into=taken, shape=plain.shape)
        if plain is not y:
            shape = editor.with_last(product.x, one.outputs, before=product.node)
            added = editor.node("Reshape", [added, shape], f"{label}/Reshape", into=taken, shape=y.shape)
        within.append(added)
        without.append(editor.node("Identity", [y], f"{label}/Identity", into=passed, shape=y.shape))
    results = editor.choose(form.loaded, (taken, within), (passed, without), f"{name}/If", after=members[-1][1].node)
    for (_, product), result in zip(members, results, strict=True):
        editor.replace(product.y, result, keep=[*taken, *passed])
