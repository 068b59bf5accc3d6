"""Fused mode: the update as a branch beside the product, with the trained tensors inside.

    y = x Wᵀ + S(x) D        S(x)[k] = sum of x[j] over j with j mod r == k, x padded with zeros to a multiple of r

S(x) depends on x and r alone: it is made once for all products that read the same x. Which forms were tried, and
what each costs, is in docs/performance.md. A method whose `down` has weights of its own has x Aᵀ in its place:

    y = x Wᵀ + (x Aᵀ) Bᵀ     A (r, in), B (out, r) times the scale; in a packed weight those of its layers one after
                             the other, B with zeros beside the columns of each
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.methods import Tiling
from fossil_export.onnx._places import OpenGraph, Place
from fossil_export.onnx._signature import Slot, lora_slot
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._sites import Site
from fossil_export.onnx.graph._weight import Weight, round_to, stored

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def rewrite(graph: OpenGraph, editor: Editor) -> tuple[Slot, ...]:
    """Beside float weights the tiled tensors lengthen the product, [x, S(x)] [W; D]; beside quantized ones, and if x is
    of unknown rank, they are in a Gemm whose C is the base's product, and so are those with an A. Gives the names of
    the latter's constants."""
    sums: dict[tuple[int, int, bool], ir.Value] = {}
    constants: dict[str, ir.Value] = {}
    pairs = _Pairs(editor)
    for place, site in graph.in_order():
        branch = graph.branch(place)
        if not isinstance(branch.down, Tiling):
            pairs.add(place, site, branch.up, branch.down)
            continue
        trained = round_to(branch.up, site.activation, f"the shard of {place.label}")
        rank = trained.shape[0]
        longer = _lengthens(site)
        key = (id(site.x), rank, longer)
        if key not in sums:
            sums[key] = _lengthened(editor, site, rank) if longer else _sum(editor, site, rank)
        if longer:
            if place.label not in constants:
                weight = graph.sites[place.label][0].weight
                constants[place.label] = _longer_weight(editor, weight, place.label, trained)
            site.node.replace_input_with(0, sums[key])
            site.node.replace_input_with(1, constants[place.label])
        else:
            if place.label not in constants:
                constants[place.label] = editor.constant(f"{place.label}.shard", trained)
            _add(editor, site, place, sums[key], constants[place.label])
    return tuple(pairs.slots.values())


class _Pairs:
    """Branches with constants A and B, of which each place has one pair however often its weight is read."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._flat: dict[int, ir.Value] = {}
        self._constants: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.slots: dict[str, Slot] = {}

    def add(self, place: Place, site: Site, up: Array, down: Array) -> None:
        editor, label = self._editor, place.label
        if label not in self._constants:
            slot = lora_slot(place, site)
            first, second = (
                editor.constant(name, round_to(values, site.activation, f"{name} of the adapter"))
                for name, values in ((slot.down, down.T), (slot.name, up))
            )
            self._constants[label], self.slots[label] = (first, second), slot
        first, second = self._constants[label]
        if id(site.x) not in self._flat:
            name = f"{site.x.name}/fossil/flat"
            self._flat[id(site.x)] = editor.flat(site.x, name, place.inputs, before=site.node)
        x, shape = self._flat[id(site.x)], [None, len(down)]
        product = editor.node("MatMul", [x, first], f"{label}/fossil/MatMul", before=site.node, shape=shape)
        _add(editor, site, place, product, second)


def makes_weights(graph: OpenGraph) -> bool:
    return any(_lengthens(site) and graph.is_tiling(place) for place, site in graph.in_order())


def _lengthens(site: Site) -> bool:
    """Whether fused mode lengthens this product, which makes its weight anew."""
    return site.weight.direct and site.weight.bits is None and site.x.shape is not None


def _lengthened(editor: Editor, site: Site, rank: int) -> ir.Value:
    """[x, S(x)] along the last axis, with the dimensions of x."""
    name, before = f"{site.x.name}/fossil", site.node
    dims = list(site.x.shape)
    times, padded = _padded(editor, site.x, site, rank)
    shape = editor.integers([0] * (len(dims) - 1) + [times, rank])
    cut = editor.node("Reshape", [padded, shape], f"{name}/Reshape", before=before, shape=[*dims[:-1], times, rank])
    axis = editor.integers([len(dims) - 1])
    summed = editor.node(
        "ReduceSum", [cut, axis], f"{name}/ReduceSum", before=before, shape=[*dims[:-1], rank], keepdims=0
    )
    summed = editor.cast(summed, site.x.dtype, f"{name}/Cast", before=before)
    length = [*dims[:-1], site.weight.inputs + rank]
    return editor.node("Concat", [site.x, summed], f"{name}/Concat", before=before, shape=length, axis=-1)


def _longer_weight(editor: Editor, weight: Weight, label: str, trained: Array) -> ir.Value:
    """The stored weight with D below it (in + r, out), or beside it if rows are outputs."""
    tensor = weight.value.const_value
    by_rows = weight.transposed
    inputs = weight.inputs + len(trained)
    shape = (inputs, weight.outputs) if by_rows else (weight.outputs, inputs)
    name = f"{label}.weight_and_shard"

    def joined() -> ir.Tensor:
        parts = [stored(tensor), trained if by_rows else trained.T]
        return ir.Tensor(np.concatenate(parts, 0 if by_rows else 1), tensor.dtype, name=name)

    return editor.lazy(name, ir.LazyTensor(joined, tensor.dtype, ir.Shape(shape), name=name))


def _sum(editor: Editor, site: Site, rank: int) -> ir.Value:
    """S(x) (positions, r) for a known r."""
    name, before = f"{site.x.name}/fossil", site.node
    flat = editor.flat(site.x, f"{name}/flat", site.weight.inputs, before=before) if site.x.shape is None else site.x
    times, padded = _padded(editor, flat, site, rank)
    shape = editor.integers([-1, times, rank])
    cut = editor.node("Reshape", [padded, shape], f"{name}/Reshape", before=before, shape=[None, times, rank])
    axis = editor.integers([1])
    summed = editor.node("ReduceSum", [cut, axis], f"{name}/ReduceSum", before=before, shape=[None, rank], keepdims=0)
    return editor.cast(summed, site.x.dtype, f"{name}/Cast", before=before)


def _padded(editor: Editor, x: ir.Value, site: Site, rank: int) -> tuple[int, ir.Value]:
    """How often r fits into x, and x with zeros up to that (`Editor.padded`)."""
    inputs = site.weight.inputs
    times = -(-inputs // rank)
    if times * rank != inputs:
        pads = [0] * (2 * len(x.shape) - 1) + [times * rank - inputs]
        dims = [*list(x.shape)[:-1], times * rank]
        x = editor.padded(x, editor.integers(pads), f"{site.x.name}/fossil/Pad", dims, before=site.node)
    return times, x


def _add(editor: Editor, site: Site, place: Place, summed: ir.Value, trained: ir.Value) -> None:
    """y + S(x) D in one Gemm, whose C is y; whoever read y reads the sum."""
    name = f"{place.label}/fossil"
    y, outputs = site.y, place.outputs
    flat = editor.flat(y, f"{name}/flat", outputs, after=site.node)
    last = site.node if flat is y else flat.producer()
    added = editor.node("Gemm", [summed, trained, flat], f"{name}/Gemm", after=last, shape=[None, outputs])
    if flat is y:
        editor.replace(y, added, keep=[added.producer()])
        return
    shape = editor.with_last(site.x, outputs, before=site.node)
    back = editor.node("Reshape", [added, shape], f"{name}/Reshape", after=added.producer(), shape=y.shape)
    editor.replace(y, back, keep=[flat.producer()])
