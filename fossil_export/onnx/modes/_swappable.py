"""Swappable mode: the branches of fused mode, with the trained tensors as optional inputs of any rank.

An adapter file gives the inputs their values while a session runs. Without one the branches are not run. There are
two kinds of graph. For adapters that sum their inputs each place has one input, D, and layers of one kind have one
rank, which S(x) is made for. For all others it has two, LoRA's A and B, of a rank of its own; such a graph takes both
kinds of adapters, since a shard is the LoRA whose A is the tiling matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fossil_export.onnx._places import OpenGraph, Place
from fossil_export.onnx._signature import Slot, lora_slot
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._sites import Site


def rewrite(graph: OpenGraph, editor: Editor) -> list[Slot]:
    """The inputs of every place. Their default, of rank 0, means "no adapter": the branches are not run."""
    return _with_sums(graph, editor) if all(map(graph.is_tiling, graph.places)) else _with_pairs(graph, editor)


def _with_sums(graph: OpenGraph, editor: Editor) -> list[Slot]:
    inputs: dict[str, ir.Value] = {}
    forms: dict[str, _Form] = {}
    groups: dict[tuple[int, str], list[tuple[Place, Site]]] = {}
    slots = []
    for place, site in graph.in_order():
        if place.label not in inputs:
            name = f"{place.label}.shard"
            inputs[place.label] = _input(editor, name, site, [f"rank_{place.kind}", place.outputs])
            slots.append(Slot(name, place.kind, site.activation, place.inputs, place.outputs, place.pieces))
        groups.setdefault((id(site.x), place.kind), []).append((place, site))
    first = next(iter(editor.graph))
    for members in groups.values():
        place = members[0][0]
        if place.kind not in forms:
            forms[place.kind] = _form(editor, first, inputs[place.label], place)
        _branch(editor, members, inputs, forms[place.kind])
    return slots


def _with_pairs(graph: OpenGraph, editor: Editor) -> list[Slot]:
    """y + (x A) B for inputs A (in, r) and B (r, out)."""
    inputs: dict[str, tuple[ir.Value, ir.Value]] = {}
    loaded: dict[str, ir.Value] = {}
    groups: dict[tuple[int, str], list[tuple[Place, Site]]] = {}
    slots = []
    first = next(iter(editor.graph))
    for place, site in graph.in_order():
        if place.label not in inputs:
            slot, rank = lora_slot(place, site), f"rank_{place.label}"
            down = _input(editor, slot.down, site, [place.inputs, rank])
            up = _input(editor, slot.name, site, [rank, place.outputs])
            inputs[place.label] = down, up
            slots.append(slot)
            if place.kind not in loaded:  # an adapter file has all places of a kind or none
                loaded[place.kind] = _loaded(editor, first, _rank(editor, first, up, place), place)
        groups.setdefault((id(site.x), place.kind), []).append((place, site))
    for members in groups.values():
        _pair_branch(editor, members, inputs, loaded[members[0][0].kind])
    return slots


def _input(editor: Editor, name: str, site: Site, shape: list[int | str]) -> ir.Value:
    """An optional input whose default has rank 0."""
    dtype = ir.DataType[site.activation]
    null = np.zeros([0 if isinstance(size, str) else size for size in shape], dtype.numpy())
    value = editor.initializer(name, ir.Tensor(null, dtype, name=name))
    value.shape = ir.Shape(shape)
    editor.graph.inputs.append(value)
    return value


def _rank(editor: Editor, before: ir.Node, given: ir.Value, place: Place) -> ir.Value:
    kind = ir.DataType.INT64
    name = f"fossil/{place.kind}/rank"
    return editor.node("Shape", [given], name, before=before, shape=[1], dtype=kind, start=0, end=1)


def _loaded(editor: Editor, before: ir.Node, rank: ir.Value, place: Place) -> ir.Value:
    name, boolean = f"fossil/{place.kind}/is_loaded", ir.DataType.BOOL
    return editor.node("Greater", [rank, editor.integers([0])], name, before=before, shape=[1], dtype=boolean)


@dataclass(frozen=True)
class _Form:
    """For inputs of one width and the rank that is loaded: is there one, what to add to x, what to cut it into."""

    loaded: ir.Value
    pads: ir.Value
    shape: ir.Value


def _form(editor: Editor, before: ir.Node, given: ir.Value, place: Place) -> _Form:
    name = f"fossil/{place.kind}"
    rank = _rank(editor, before, given, place)
    loaded = _loaded(editor, before, rank, place)
    one = editor.integers([1])
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
    place, site = members[0]
    name, rank = f"{site.x.name}/fossil", f"rank_{place.kind}"
    taken: list[ir.Node] = []
    flat = editor.flat(site.x, f"{name}/flat", place.inputs, into=taken)
    padded = editor.padded(flat, form.pads, f"{name}/Pad", [None, None], into=taken)
    cut = editor.node("Reshape", [padded, form.shape], f"{name}/Reshape", into=taken, shape=[None, None, rank])
    axis = editor.integers([1])
    summed = editor.node("ReduceSum", [cut, axis], f"{name}/ReduceSum", into=taken, shape=[None, rank], keepdims=0)
    summed = editor.cast(summed, flat.dtype, f"{name}/Cast", into=taken)
    _choose(editor, members, form.loaded, taken, {one.label: (summed, inputs[one.label]) for one, _ in members})


def _pair_branch(
    editor: Editor,
    members: list[tuple[Place, Site]],
    inputs: Mapping[str, tuple[ir.Value, ir.Value]],
    loaded: ir.Value,
) -> None:
    place, site = members[0]
    taken: list[ir.Node] = []
    flat = editor.flat(site.x, f"{site.x.name}/fossil/flat", place.inputs, into=taken)
    factors = {}
    for one, _ in members:
        down, up = inputs[one.label]
        name, shape = f"{one.label}/fossil/MatMul", [None, f"rank_{one.label}"]
        factors[one.label] = editor.node("MatMul", [flat, down], name, into=taken, shape=shape), up
    _choose(editor, members, loaded, taken, factors)


def _choose(
    editor: Editor,
    members: list[tuple[Place, Site]],
    loaded: ir.Value,
    taken: list[ir.Node],
    factors: Mapping[str, tuple[ir.Value, ir.Value]],
) -> None:
    """One If for all products of one x: if an adapter is loaded, their sums with the product of each place's
    `factors`, which `taken` makes, else they themselves."""
    name = f"{members[0][1].x.name}/fossil"
    passed: list[ir.Node] = []
    within, without = [], []
    for one, product in members:
        label, y = f"{one.label}/fossil", product.y
        plain = editor.flat(y, f"{label}/flat", one.outputs, into=taken)
        added = editor.node("Gemm", [*factors[one.label], plain], f"{label}/Gemm", into=taken, shape=plain.shape)
        if plain is not y:
            shape = editor.with_last(product.x, one.outputs, before=product.node)
            added = editor.node("Reshape", [added, shape], f"{label}/Reshape", into=taken, shape=y.shape)
        within.append(added)
        without.append(editor.node("Identity", [y], f"{label}/Identity", into=passed, shape=y.shape))
    results = editor.choose(loaded, (taken, within), (passed, without), f"{name}/If", after=members[-1][1].node)
    for (_, product), result in zip(members, results, strict=True):
        editor.replace(product.y, result, keep=[*taken, *passed])
