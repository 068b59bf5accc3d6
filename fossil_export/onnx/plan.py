"""What is done to a graph, decided before anything is written: which weights get which shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints.dtypes import numpy_dtype
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.errors import OnnxError, listed
from fossil_export.merging.plan import MergePlan
from fossil_export.methods import METHODS, Tiling
from fossil_export.onnx.graph_file import MARK, load_graph
from fossil_export.onnx.locate import Found, Piece, Wanted, locate
from fossil_export.onnx.sites import Site, find_sites
from fossil_export.onnx.weight import SAFETENSORS_NAME

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

MODES = ("merged", "tiled", "fused", "swappable")

_OLDEST = {"merged": 1, "tiled": 13, "fused": 13, "swappable": 15}
"""Opsets that have the operators used: ReduceSum with axes as an input (13), Shape of a range (15)."""


@dataclass(frozen=True)
class Target:
    """One weight of the graph that gets shards: `pieces` says which modules' outputs are which of its own.

    `label` names it in the graph and in adapter files; `sites` are the nodes that read the weight (several
    where layers share it); `kind` is the same for the targets of all layers that do the same.
    """

    label: str
    kind: str
    sites: tuple[Site, ...]
    pieces: tuple[Piece, ...]

    @property
    def outputs(self) -> int:
        return self.sites[0].weight.outputs

    @property
    def inputs(self) -> int:
        return self.sites[0].weight.inputs


@dataclass(frozen=True)
class OnnxPlan:
    """The adapter, the graph as loaded (to be rewritten in place), and the places in it."""

    mode: str
    merge: MergePlan
    model: ir.Model
    graph: Path
    targets: tuple[Target, ...]
    base_weights: Mapping[str, Array]
    """The base's weight (out, in) of each trained module, a view."""

    @property
    def adapter(self) -> Adapter:
        return self.merge.adapter

    def shard(self, target: Target) -> Array:
        """D (r, out) of a target in float32: the shards of its pieces side by side, zeros where nothing was trained."""
        return joined(self.adapter, target.pieces, target.outputs)


def joined(adapter: Adapter, pieces: Iterable[Piece], outputs: int, rank: int | None = None) -> Array:
    """D (r, `outputs`) in float32 from the shards of `pieces`; modules that `adapter` lacks stay zero.

    `rank` is needed only where it lacks all of them. Raises OnnxError for shards of different ranks.
    """
    present = [(piece, adapter.trained[piece.module]) for piece in pieces if piece.module in adapter.trained]
    ranks = {trained.form_rank or 1 for _, trained in present} or {rank or 1}
    if len(ranks) > 1:
        names = [piece.module for piece, _ in present]
        raise OnnxError(
            f"{adapter.path}: {listed(names)} lie in one weight of the graph but have ranks {sorted(ranks)}"
        )
    whole = np.zeros((ranks.pop(), outputs), np.float32)
    for piece, trained in present:
        dense = tile_form(adapter, trained, piece)
        whole[:, piece.at : piece.at + piece.count] = dense[:, piece.start : piece.start + piece.count]
    return whole


def tile_form(adapter: Adapter, trained: Trained, piece: Piece) -> Array:
    """D (r, out) of a whole module in float32."""
    arrays = {role: np.asarray(adapter.array(info), np.float32) for role, info in trained.tensors.items()}
    for role, values in arrays.items():
        if not np.isfinite(values).all():
            info = trained.tensors[role]
            raise OnnxError(f"{info.path}: {info.name} holds infinite or NaN values; training diverged")
    outputs = max(piece.start + piece.count, *(values.shape[-1] for values in arrays.values()))
    form = METHODS[trained.method].low_rank(arrays, trained.numbers, outputs)
    assert form is not None and isinstance(form.down, Tiling), trained.method  # refused when the plan was made
    return np.asarray(form.up.T)


def check_mode(adapter: Adapter, mode: str, precision: str | None = None) -> None:
    """Raise OnnxError for what can be refused before a graph is made."""
    if mode not in MODES:
        raise OnnxError(f"mode is {mode!r}, expected {', '.join(MODES)}")
    if mode in ("fused", "swappable") and any(trained.form_rank is None for trained in adapter.trained.values()):
        raise OnnxError(
            f"{adapter.path}: is a {adapter.variant} adapter, whose update depends on the weight it changes and is no "
            "branch beside it; use --mode tiled or merged, or approximate it by a LoRA"
        )
    if mode == "tiled" and precision == "int4":
        raise OnnxError(
            "--mode tiled adds to float weights, and int4 weights are codes; use --mode fused or swappable, or "
            "--mode merged, which quantizes the merged weights"
        )


def _weight(adapter: Adapter, info: TensorInfo) -> Array:
    """A weight (out, in) that may be the base's: mapped, since all of them are looked at here and there, at once."""
    if info.offset is None or info.path in adapter.files:
        return adapter.array(info)
    raw = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,))
    return raw.view(numpy_dtype(info.dtype)).reshape(info.shape)


def plan_onnx(merge: MergePlan, mode: str, graph: Path) -> OnnxPlan:
    """Read `graph` and place every shard of the merge plan in it. Raises OnnxError with everything that stops it."""
    model = load_graph(graph)
    check_graph(model, graph, mode)
    sites = find_sites(model.graph)
    if any(value is not None and value.dtype is None for s in sites for value in (s.x, s.y, s.node.inputs[1])):
        import onnx_ir.passes.common as passes

        passes.ShapeInferencePass()(model)  # a graph by hand, without types of what lies between
        sites = find_sites(model.graph)
    wanted = [
        Wanted(module, (module, tensor.name.removesuffix(".weight")), _weight(merge.adapter, tensor.source))
        for module, tensor in merge.modules.items()
    ]
    siblings = {
        name.removesuffix(".weight"): info.shape[0]
        for name, info in merge.base.tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight")
    }
    found = locate(wanted, sites, siblings, str(graph))
    targets = _targets(found, sites)
    if mode in ("merged", "tiled"):
        coded = [target.label for target in targets if target.sites[0].weight.bits is not None]
        if coded:
            raise OnnxError(
                f"{graph}: {listed(coded)} are quantized, and shards cannot be added to codes; use --mode fused "
                "or swappable"
            )
    _refuse_other_products(targets, graph)
    wide = [target.label for target in targets if target.sites[0].weight.dtype == "DOUBLE"]
    if wide and mode in ("merged", "tiled"):
        raise OnnxError(
            f"{graph}: {listed(wide)} are stored as DOUBLE, and shards are added in float32; use --mode fused"
        )
    ranks: dict[str, set[int]] = defaultdict(set)
    for target in targets:
        ranks[target.kind] |= {merge.adapter.trained[piece.module].rank for piece in target.pieces}
    if mode == "swappable" and any(len(found_ranks) > 1 for found_ranks in ranks.values()):
        raise OnnxError(f"{merge.adapter.path}: layers of one kind have different ranks; use --mode fused or tiled")
    return OnnxPlan(mode, merge, model, graph, targets, {one.module: one.weight for one in wanted})


def check_graph(model: ir.Model, graph: Path, mode: str) -> None:
    """Raise OnnxError unless the graph can take an adapter in this mode."""
    if MARK in model.metadata_props:
        raise OnnxError(
            f"{graph}: carries an adapter already; name the plain graph it was made from"
            + (", or add adapters with convert --to onnx-adapter" if "swappable" in model.metadata_props[MARK] else "")
        )
    opset = model.graph.opset_imports.get("", 0)
    if opset < _OLDEST[mode]:
        raise OnnxError(
            f"{graph}: has opset {opset}, --mode {mode} needs {_OLDEST[mode]}; raise it with "
            "onnx.version_converter.convert_version(model, 18), or export the graph again"
        )


def _targets(found: Found, sites: tuple[Site, ...]) -> tuple[Target, ...]:
    """One target a weight, in the order of the graph, each with a name and a kind of its own."""
    by_weight: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        if site in found:
            by_weight[id(site.weight.value)].append(site)
    targets = [
        Target("", "", tuple(readers), tuple(sorted(found[readers[0]], key=lambda piece: piece.at)))
        for readers in by_weight.values()
    ]
    labels: dict[str, int] = {}
    named = []
    for target in targets:
        label = _label(target)
        labels[label] = labels.get(label, 0) + 1
        named.append(replace(target, label=label if labels[label] == 1 else f"{label}.{labels[label]}"))
    # Layers that do the same are told by the names of all products of one input.
    tails: dict[int, list[str]] = defaultdict(list)
    for target in named:
        tails[id(target.sites[0].x)].append(target.label.rpartition(".")[2])
    named = [replace(t, kind=f"{'+'.join(tails[id(t.sites[0].x)])}.{t.inputs}") for t in named]
    return tuple(named)


def _label(target: Target) -> str:
    """The module's name; for packed weights their path in the graph, else the parent's and the parts' names."""
    modules = list(dict.fromkeys(piece.module for piece in target.pieces))
    if len(modules) == 1 and target.pieces[0].count == target.outputs:
        return modules[0]
    paths = [path for path in target.sites[0].paths if "." in path]
    if paths:
        return paths[0]
    parent = modules[0].rpartition(".")[0]
    return f"{parent}.{'_'.join(module.rpartition('.')[2] for module in modules)}".lstrip(".")


_PASSES_ON = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def _refuse_other_products(targets: tuple[Target, ...], graph: Path) -> None:
    """Raise OnnxError where a weight is also read by a product that gets no shard, in a branch of the graph, say."""
    for target in targets:
        ours = {id(site.node) for site in target.sites}
        values, seen = [target.sites[0].weight.value], set()
        while values:
            for usage in values.pop().uses():
                node = usage.node
                if id(node) in ours or id(node) in seen:
                    continue
                seen.add(id(node))
                if node.op_type in _PASSES_ON:
                    values += node.outputs
                elif "MatMul" in node.op_type or node.op_type in ("Gemm", "Conv", "Einsum", "Attention"):
                    raise OnnxError(
                        f"{graph}: the weight of {target.label} is also read by {node.name or node.op_type}, which "
                        "cannot take a shard; export the graph again without optimisations"
                    )


def round_to(values: Array, dtype: str, what: str) -> Array:
    """`values` as ONNX's float type `dtype`. Raises OnnxError where they do not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(numpy_dtype(SAFETENSORS_NAME[dtype]))
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise OnnxError(f"{what} does not fit {dtype}; use a wider --precision")
    return rounded
