"""Fused and swappable modes: the update as a branch beside the product, y = x Wᵀ + S(x) D.

    S(x)[k] = sum of x[j] over j with j mod r == k        x padded with zeros to a multiple of r

S(x) depends on x and r alone: it is made once for all products that read the same x. Which forms were tried, and
what each costs, is in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.onnx.edit import Editor
from fossil_export.onnx.plan import OnnxPlan, Target, round_to
from fossil_export.onnx.signature import Slot
from fossil_export.onnx.sites import Site
from fossil_export.onnx.weight import stored

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def fused(plan: OnnxPlan, editor: Editor) -> None:
    """Shards as initializers. Beside float weights they lengthen the product, [x, S(x)] [W; D]; beside quantized
    ones, and where x is of unknown rank, they are a Gemm whose C is the base's product."""
    sums: dict[tuple[int, int, bool], ir.Value] = {}
    shards: dict[str, ir.Value] = {}
    for target, site in _in_order(plan):
        shard = round_to(plan.shard(target), site.activation, f"the shard of {target.label}")
        rank = shard.shape[0]
        longer = lengthens(site)
        key = (id(site.x), rank, longer)
        if key not in sums:
            sums[key] = _lengthened(editor, site, rank) if longer else _sum(editor, site, rank)
        if longer:
            if target.label not in shards:
                shards[target.label] = _longer_weight(editor, target, shard)
            site.node.replace_input_with(0, sums[key])
            site.node.replace_input_with(1, shards[target.label])
        else:
            if target.label not in shards:
                shards[target.label] = editor.shard(f"{target.label}.shard", shard)
            _add(editor, site, target, sums[key], shards[target.label])


def lengthens(site: Site) -> bool:
    """Whether fused mode lengthens this product, which makes its weight anew."""
    return site.weight.direct and site.weight.bits is None and site.x.shape is not None


def swappable(plan: OnnxPlan, editor: Editor) -> list[Slot]:
    """Shards as optional inputs of any rank. The default, of rank 0, means "no adapter": the branches are not run."""
    inputs: dict[str, ir.Value] = {}
    forms: dict[str, _Form] = {}
    groups: dict[tuple[int, str], list[tuple[Target, Site]]] = {}
    slots = []
    for target, site in _in_order(plan):
        if target.label not in inputs:
            name, dtype = f"{target.label}.shard", ir.DataType[site.activation]
            null = ir.Tensor(np.zeros((0, target.outputs), dtype.numpy()), dtype, name=name)
            value = editor.initializer(name, null)
            value.shape = ir.Shape([f"rank_{target.kind}", target.outputs])
            editor.graph.inputs.append(value)
            inputs[target.label] = value
            slots.append(Slot(name, target.kind, site.activation, target.inputs, target.outputs, target.pieces))
        groups.setdefault((id(site.x), target.kind), []).append((target, site))
    first = next(iter(editor.graph))
    for members in groups.values():
        target = members[0][0]
        if target.kind not in forms:
            forms[target.kind] = _form(editor, first, inputs[target.label], target)
        _branch(editor, members, inputs, forms[target.kind])
    return slots


def _in_order(plan: OnnxPlan) -> Iterator[tuple[Target, Site]]:
    """Targets and their nodes in the order of the graph."""
    places = {id(node): index for index, node in enumerate(plan.model.graph)}
    pairs = [(target, site) for target in plan.targets for site in target.sites]
    return iter(sorted(pairs, key=lambda pair: places[id(pair[1].node)]))


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
    length = [*dims[:-1], site.weight.inputs + rank]
    return editor.node("Concat", [site.x, summed], f"{name}/Concat", before=before, shape=length, axis=-1)


def _longer_weight(editor: Editor, target: Target, shard: Array) -> ir.Value:
    """The stored weight with D below it (in + r, out), or beside it where rows are outputs."""
    weight = target.sites[0].weight
    tensor = weight.value.const_value
    by_rows = weight.transposed
    shape = (weight.inputs + len(shard), weight.outputs) if by_rows else (weight.outputs, weight.inputs + len(shard))
    name = f"{target.label}.weight_and_shard"

    def joined() -> ir.Tensor:
        parts = [stored(tensor), shard if by_rows else shard.T]
        return ir.Tensor(np.concatenate(parts, 0 if by_rows else 1), tensor.dtype, name=name)

    return editor.lazy(name, ir.LazyTensor(joined, tensor.dtype, ir.Shape(shape), name=name))


def _sum(editor: Editor, site: Site, rank: int) -> ir.Value:
    """S(x) (positions, r) for a known r."""
    name, before = f"{site.x.name}/fossil", site.node
    flat = _flat(editor, site.x, f"{name}/flat", site.weight.inputs, before=before) if site.x.shape is None else site.x
    times, padded = _padded(editor, flat, site, rank)
    shape = editor.integers([-1, times, rank])
    cut = editor.node("Reshape", [padded, shape], f"{name}/Reshape", before=before, shape=[None, times, rank])
    axis = editor.integers([1])
    return editor.node("ReduceSum", [cut, axis], f"{name}/ReduceSum", before=before, shape=[None, rank], keepdims=0)


def _padded(editor: Editor, x: ir.Value, site: Site, rank: int) -> tuple[int, ir.Value]:
    """How often r fits into x, and x with zeros up to that."""
    inputs = site.weight.inputs
    times = -(-inputs // rank)
    if times * rank != inputs:
        pads = [0] * (2 * len(x.shape) - 1) + [times * rank - inputs]
        dims = [*list(x.shape)[:-1], times * rank]
        x = editor.node("Pad", [x, editor.integers(pads)], f"{site.x.name}/fossil/Pad", before=site.node, shape=dims)
    return times, x


@dataclass(frozen=True)
class _Form:
    """For inputs of one width and the rank that is loaded: is there one, what to add to x, what to cut it into."""

    loaded: ir.Value
    pads: ir.Value
    shape: ir.Value


def _form(editor: Editor, before: ir.Node, shard: ir.Value, target: Target) -> _Form:
    name = f"fossil/{target.kind}"
    kind = ir.DataType.INT64
    rank = editor.node("Shape", [shard], f"{name}/rank", before=before, shape=[1], dtype=kind, start=0, end=1)
    none, one = editor.integers([0]), editor.integers([1])
    boolean = ir.DataType.BOOL
    loaded = editor.node("Greater", [rank, none], f"{name}/is_loaded", before=before, shape=[1], dtype=boolean)
    divisor = editor.node("Max", [rank, one], f"{name}/divisor", before=before, shape=[1])
    top = editor.node("Add", [rank, editor.integers([target.inputs - 1])], f"{name}/Add", before=before, shape=[1])
    times = editor.node("Div", [top, divisor], f"{name}/times", before=before, shape=[1])
    full = editor.node("Mul", [times, rank], f"{name}/padded_width", before=before, shape=[1])
    width = editor.integers([target.inputs])
    missing = editor.node("Sub", [full, width], f"{name}/missing", before=before, shape=[1])
    pads = [editor.integers([0, 0, 0]), missing]
    shape = [editor.integers([-1]), times, rank]
    return _Form(
        loaded,
        editor.node("Concat", pads, f"{name}/pads", before=before, shape=[4], axis=0),
        editor.node("Concat", shape, f"{name}/shape", before=before, shape=[3], axis=0),
    )


def _branch(editor: Editor, members: list[tuple[Target, Site]], shards: Mapping[str, ir.Value], form: _Form) -> None:
    """One If for all products of one x: their sums with S(x) D where an adapter is loaded, else they themselves."""
    target, site = members[0]
    name, rank = f"{site.x.name}/fossil", f"rank_{target.kind}"
    taken: list[ir.Node] = []
    flat = _flat(editor, site.x, f"{name}/flat", target.inputs, into=taken)
    padded = editor.node("Pad", [flat, form.pads], f"{name}/Pad", into=taken, shape=[None, None])
    cut = editor.node("Reshape", [padded, form.shape], f"{name}/Reshape", into=taken, shape=[None, None, rank])
    axis = editor.integers([1])
    summed = editor.node("ReduceSum", [cut, axis], f"{name}/ReduceSum", into=taken, shape=[None, rank], keepdims=0)
    passed: list[ir.Node] = []
    within, without = [], []
    for one, product in members:
        label, y = f"{one.label}/fossil", product.y
        plain = _flat(editor, y, f"{label}/flat", one.outputs, into=taken)
        added = editor.node("Gemm", [summed, shards[one.label], plain], f"{label}/Gemm", into=taken, shape=plain.shape)
        if plain is not y:
            shape = editor.with_last(product.x, one.outputs, before=product.node)
            added = editor.node("Reshape", [added, shape], f"{label}/Reshape", into=taken, shape=y.shape)
        within.append(added)
        without.append(editor.node("Identity", [y], f"{label}/Identity", into=passed, shape=y.shape))
    results = editor.choose(form.loaded, (taken, within), (passed, without), f"{name}/If", after=members[-1][1].node)
    for (_, product), result in zip(members, results, strict=True):
        editor.replace(product.y, result, keep=[*taken, *passed])


def _flat(editor: Editor, value: ir.Value, name: str, width: int, **where: Any) -> ir.Value:
    """`value` as a matrix (positions, width); itself where it is one."""
    if value.shape is not None and len(value.shape) == 2:
        return value
    return editor.node("Reshape", [value, editor.integers([-1, width])], name, shape=[None, width], **where)


def _add(editor: Editor, site: Site, target: Target, summed: ir.Value, shard: ir.Value) -> None:
    """y + S(x) D in one Gemm, whose C is y; whoever read y reads the sum."""
    name = f"{target.label}/fossil"
    y, outputs = site.y, target.outputs
    flat = _flat(editor, y, f"{name}/flat", outputs, after=site.node)
    last = site.node if flat is y else flat.producer()
    added = editor.node("Gemm", [summed, shard, flat], f"{name}/Gemm", after=last, shape=[None, outputs])
    if flat is y:
        editor.replace(y, added, keep=[added.producer()])
        return
    shape = editor.with_last(site.x, outputs, before=site.node)
    back = editor.node("Reshape", [added, shape], f"{name}/Reshape", after=added.producer(), shape=y.shape)
    editor.replace(y, back, keep=[flat.producer()])
