"""The shards of a graph with branches, value by value: what a Gemm multiplies by must be what was trained.

Computed on its own (by index, from the paper's formulas), not by the code that wrote the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export.adapters import Adapter, Trained
from fossil_export.errors import OnnxError, listed
from fossil_export.onnx._adapter_file import ADAPTER
from fossil_export.onnx._signature import Outlet, read_mark, read_signature
from fossil_export.onnx.builders._existing import find_graph
from fossil_export.onnx.graph._file import load_graph
from fossil_export.onnx.graph._match import Piece
from fossil_export.onnx.graph._weight import stored
from fossil_export.verifying.reference import EXACT

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def check_shards(folder: Path, adapter: Adapter) -> list[str]:
    """What is wrong with the shards of a fused or swappable graph, one line each; nothing for other modes."""
    graph = find_graph(folder)
    model = load_graph(graph)
    mark = read_mark(graph, model)
    if mark.get("mode") not in ("fused", "swappable"):
        return []
    if mark["mode"] == "swappable":
        return list(_check_file(folder, graph, adapter))
    values = {value.name: value for node in model.graph for value in node.outputs}
    problems: list[str] = []
    for outlet in (Outlet(**entry) for entry in mark.get("outlets", ())):
        trained, node = adapter.trained.get(outlet.module), _gemm(values.get(outlet.value))
        if trained is not None and node is not None:
            piece = Piece(outlet.module, 0, outlet.at, outlet.count)
            problems += _compare(piece, stored(node.inputs[1].const_value), trained, adapter)
    return problems


def _check_file(folder: Path, graph: Path, adapter: Adapter) -> Iterator[str]:
    """The adapter file against the trained shards, by the slots of the graph's signature."""
    signature = read_signature(graph)
    file = _parameters(folder / ADAPTER)
    known = {piece.module for slot in signature.slots for piece in slot.pieces}
    if missing := [module for module in adapter.trained if module not in known]:
        yield f"the graph has no inputs for {listed(missing)}"
    for slot in signature.slots:
        trained = [piece for piece in slot.pieces if piece.module in adapter.trained]
        values = file.get(slot.name)
        if values is None:
            if trained:
                yield f"{trained[0].module} has no shard in {ADAPTER}"
            continue
        covered = np.zeros(slot.outputs, bool)
        for piece in trained:
            yield from _compare(piece, values, adapter.trained[piece.module], adapter)
            covered[piece.at : piece.at + piece.count] = True
        if values[:, ~covered].any():
            yield f"{slot.name}: has values for modules that were not trained"


def _compare(piece: Piece, found: Array, trained: Trained, adapter: Adapter) -> Iterator[str]:
    exactly = EXACT[trained.method]
    part = exactly.part(adapter.arrays(trained.module), piece.start, piece.start + piece.count)
    up = exactly.up(part, trained.numbers)
    if up is None:
        yield f"{piece.module}: a {trained.method} update is no branch beside the weight"
        return
    wanted = np.asarray(up.T, np.float32).astype(found.dtype)
    there = found[:, piece.at : piece.at + piece.count]
    if there.shape != wanted.shape:
        yield f"{piece.module}: its shard in the graph is {list(there.shape)}, the trained one {list(wanted.shape)}"
    elif not np.array_equal(there, wanted):
        row, column = np.argwhere(there != wanted)[0]
        yield (
            f"{piece.module}: its shard in the graph has {float(there[row, column]):g} at [{row}, {column}], the "
            f"trained one {float(wanted[row, column]):g}"
        )


def _gemm(value: Any) -> Any:
    """The branch's product behind a module's output, None where there is none."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Gemm" and "/fossil/" in str(node.name):
            return node
        if node.op_type not in ("Reshape", "Add"):
            return None
        value = next((operand for operand in node.inputs if operand.const_value is None), None)  # not the bias
    return None


def _parameters(path: Path) -> Mapping[str, Array]:
    ort = required("onnxruntime")
    try:
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        # Copied: the arrays look into memory that goes with `found`.
        return {name: np.array(value.numpy()) for name, value in found.items()}
    except Exception as problem:  # ONNX Runtime's own classes
        raise OnnxError(f"{path}: cannot be read; export the folder again") from problem
