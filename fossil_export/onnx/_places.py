"""Where the trained modules are in a graph, found before anything of it is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import stored_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import Matrix, find_matrix
from fossil_export.errors import OnnxError, listed
from fossil_export.merging._plan import MergePlan
from fossil_export.onnx._trained import Branch, branch, is_tiling, ranks_of
from fossil_export.onnx.graph._file import MARK, load_graph
from fossil_export.onnx.graph._match import Found, Piece, Wanted, find_places
from fossil_export.onnx.graph._sites import Site, find_sites
from fossil_export.onnx.graph._weight import FLOAT_NAMES
from fossil_export.onnx.modes import Mode

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """One weight of the graph that gets trained tensors: `pieces` says which modules' outputs are which of its own.

    `label` names it in the graph and in adapter files; `kind` is the same for the places of all layers that do the
    same. The weight is (`outputs`, `inputs`), in ONNX's type `dtype`; `bits` is the width of its codes, None for a
    float weight; `products` counts the nodes that read it (several if layers share it).
    """

    label: str
    kind: str
    outputs: int
    inputs: int
    dtype: str
    bits: int | None
    products: int
    pieces: tuple[Piece, ...]

    def to_dict(self) -> dict[str, Any]:
        """The place as JSON shows it."""
        return asdict(self)


@dataclass(frozen=True)
class OpenGraph:
    """A graph as loaded, to be rewritten in place, and where in it the modules of a merge are.

    `sites` are the nodes of each place by its label; `base_weights` is the base's weight (out, in) of each trained
    module, a view.
    """

    mode: Mode
    merge: MergePlan
    path: Path
    model: ir.Model
    places: tuple[Place, ...]
    sites: Mapping[str, tuple[Site, ...]]
    base_weights: Mapping[str, Array]

    @property
    def adapter(self) -> Adapter:
        return self.merge.adapter

    def branch(self, place: Place) -> Branch:
        """What is added at a place: its pieces side by side, zeros where nothing was trained."""
        return branch(self.adapter, place.pieces, place.outputs, place.inputs)

    def is_tiling(self, place: Place) -> bool:
        """Whether the branch at a place sums the inputs, with no weights of its own."""
        return is_tiling(self.adapter, place.pieces)

    def in_order(self) -> Iterator[tuple[Place, Site]]:
        """Places and their nodes in the order of the graph."""
        order = {id(node): index for index, node in enumerate(self.model.graph)}
        pairs = [(place, site) for place in self.places for site in self.sites[place.label]]
        return iter(sorted(pairs, key=lambda pair: order[id(pair[1].node)]))


def open_graph(merge: MergePlan, mode: Mode, path: Path) -> OpenGraph:
    """Read a graph and find every trained module of the merge in it; the base's weights must be on this machine.

    Raises OnnxError with everything that stops it.
    """
    model = load_graph(path)
    check_graph(model, path, mode)
    sites = find_sites(model.graph)
    if any(value is not None and value.dtype is None for s in sites for value in (s.x, s.y, s.node.inputs[1])):
        import onnx_ir.passes.common as passes

        passes.ShapeInferencePass()(model)  # a graph by hand, without types of what lies between
        sites = find_sites(model.graph)
    trained = merge.adapter.trained
    others = [name for name in merge.modules if name not in trained or trained[name].dimensions not in (2, None)]
    if others:
        raise OnnxError(
            f"{merge.adapter.path}: changes {listed(others)}, which are no matrices of a graph; use --mode merged "
            "without --onnx, which makes a graph of the merged model"
        )
    wanted = [
        Wanted(module, (module, tensor.name.removesuffix(".weight")), _weight(merge.adapter, merge.matrices[module]))
        for module, tensor in merge.modules.items()
    ]
    siblings = {
        name.removesuffix(".weight"): matrix.shape[0]
        for name in merge.base.tensors
        if name.endswith(".weight")
        and len(merge.base.tensors[name].shape) == 2
        and (matrix := find_matrix(name, merge.base.tensors, merge.base.config)) is not None
    }
    found = find_places(wanted, sites, siblings, str(path))
    readers = _readers(found, sites)
    places = _places(readers, found)
    by_label = {place.label: nodes for place, nodes in zip(places, readers, strict=True)}
    _refuse_codes(places, mode, path)
    _refuse_other_products(by_label, path)
    wide = [place.label for place in places if place.dtype == "DOUBLE"]
    if wide and mode.floats:
        raise OnnxError(
            f"{path}: {listed(wide)} are stored as DOUBLE, and shards are added in float32; use --mode fused"
        )
    for place in places:
        if strange := {site.activation for site in by_label[place.label]} - set(FLOAT_NAMES):
            raise OnnxError(f"{path}: {place.label} is multiplied by {listed(sorted(strange))}; export the graph again")
    ranks: dict[str, set[int]] = defaultdict(set)
    for place in places:
        ranks[place.kind] |= ranks_of(merge.adapter, place.pieces)
    tiled = all(is_tiling(merge.adapter, place.pieces) for place in places)
    if mode.swaps and tiled and any(len(of_kind) > 1 for of_kind in ranks.values()):
        raise OnnxError(f"{merge.adapter.path}: layers of one kind have different ranks; use --mode fused or tiled")
    return OpenGraph(mode, merge, path, model, places, by_label, {one.module: one.weight for one in wanted})


def check_graph(model: ir.Model, path: Path, mode: Mode) -> None:
    """Raise OnnxError unless the graph can take an adapter in this mode."""
    if MARK in model.metadata_props:
        raise OnnxError(
            f"{path}: carries an adapter already; name the plain graph it was made from"
            + (", or add adapters with convert --to onnx-adapter" if "swappable" in model.metadata_props[MARK] else "")
        )
    opset = model.graph.opset_imports.get("", 0)
    if opset < mode.opset:
        raise OnnxError(
            f"{path}: has opset {opset}, --mode {mode.name} needs {mode.opset}; raise it with "
            "onnx.version_converter.convert_version(model, 18), or export the graph again"
        )


def _weight(adapter: Adapter, matrix: Matrix) -> Array:
    """A weight (out, in) that may be the base's: mapped, since all of them are looked at here and there, at once."""

    def rows_of(info: TensorInfo, start: int, stop: int) -> Array:
        if info.coding is None and (info.offset is None or info.path in adapter.files):
            return adapter.array(info, start, stop)
        found: Array = read_rows(info, start, stop, mapped)[:]
        return found

    def mapped(info: TensorInfo, start: int, stop: int) -> Array:
        assert info.offset is not None
        raw = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,))
        return raw.view(stored_dtype(info.dtype)).reshape(info.shape)[start:stop]

    return np.asarray(matrix.read(rows_of, 0, matrix.shape[0]))


def _readers(found: Found, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """The nodes of each weight that has a module in it, in the order of the graph."""
    by_weight: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        if site in found:
            by_weight[id(site.weight.value)].append(site)
    return [tuple(nodes) for nodes in by_weight.values()]


def _places(readers: Sequence[tuple[Site, ...]], found: Found) -> tuple[Place, ...]:
    """One place a weight, each with a label of its own and the kind that it shares with other layers."""
    pieces = [tuple(sorted(found[nodes[0]], key=lambda piece: piece.at)) for nodes in readers]
    labels: list[str] = []
    for nodes, parts in zip(readers, pieces, strict=True):
        label = name = _label(nodes[0], parts)
        number = 1
        while label in labels:
            number += 1
            label = f"{name}.{number}"
        labels.append(label)
    # Layers that do the same are told by the names of all products of one input.
    tails: dict[int, list[str]] = defaultdict(list)
    for label, nodes in zip(labels, readers, strict=True):
        tails[id(nodes[0].x)].append(label.rpartition(".")[2])
    places = []
    for label, nodes, parts in zip(labels, readers, pieces, strict=True):
        weight = nodes[0].weight
        kind = f"{'+'.join(tails[id(nodes[0].x)])}.{weight.inputs}"
        places.append(Place(label, kind, weight.outputs, weight.inputs, weight.dtype, weight.bits, len(nodes), parts))
    return tuple(places)


def _label(site: Site, pieces: Sequence[Piece]) -> str:
    """The module's name; for packed weights their path in the graph, else the parent's and the parts' names."""
    modules = list(dict.fromkeys(piece.module for piece in pieces))
    if len(modules) == 1 and pieces[0].count == site.weight.outputs:
        return modules[0]
    paths = [path for path in site.paths if "." in path]
    if paths:
        return paths[0]
    parent = modules[0].rpartition(".")[0]
    return f"{parent}.{'_'.join(module.rpartition('.')[2] for module in modules)}".lstrip(".")


def _refuse_codes(places: Sequence[Place], mode: Mode, path: Path) -> None:
    coded = [place.label for place in places if place.bits is not None]
    if coded and mode.floats:
        raise OnnxError(
            f"{path}: {listed(coded)} are quantized, and shards cannot be added to codes; use --mode fused or swappable"
        )


_PASSES_ON = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def _refuse_other_products(sites: Mapping[str, Sequence[Site]], path: Path) -> None:
    """Raise OnnxError if a weight is also read by a product that gets nothing, in a branch of the graph, say."""
    for label, nodes in sites.items():
        ours = {id(site.node) for site in nodes}
        values, seen = [nodes[0].weight.value], set()
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
                        f"{path}: the weight of {label} is also read by {node.name or node.op_type}, which "
                        "cannot take a shard; export the graph again without optimisations"
                    )
