"""The shards of a graph with branches, value by value: what a Gemm multiplies by must be what was trained.

Computed on its own (by index, from the paper's formulas), not by the code that wrote the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.errors import OnnxError
from fossil_export.extras import required
from fossil_export.onnx.adapter_file import ADAPTER
from fossil_export.onnx.existing import find_graph
from fossil_export.onnx.plan import load_graph
from fossil_export.onnx.signature import Outlet, read_mark
from fossil_export.onnx.weight import stored

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def check_shards(folder: Path, adapter: Adapter) -> list[str]:
    """What is wrong with the shards of a fused or swappable graph, one line each; nothing for other modes."""
    graph = find_graph(folder)
    model = load_graph(graph)
    mark = read_mark(graph, model)
    if mark.get("mode") not in ("fused", "swappable"):
        return []
    file = _parameters(folder / ADAPTER) if mark["mode"] == "swappable" else {}
    values = {value.name: value for node in model.graph for value in node.outputs}
    problems = []
    for outlet in (Outlet(**entry) for entry in mark.get("outlets", ())):
        shard = adapter.shards.get(outlet.module)
        node = _gemm(values.get(outlet.value))
        if shard is None or node is None:
            continue
        operand = node.inputs[1]
        if operand.is_graph_input():
            if operand.name not in file:
                problems.append(f"{outlet.module} has no shard in {ADAPTER}")
                continue
            found = file[operand.name]
        else:
            found = stored(operand.const_value)
        problems += _compare(outlet, found, np.asarray(adapter.array(shard.tensor), np.float32))
    return problems


def _compare(outlet: Outlet, found: Array, trained: Array) -> Iterator[str]:
    outputs = outlet.count
    wanted = trained[:, np.arange(outputs) % trained.shape[1]].astype(found.dtype)
    part = found[:, outlet.at : outlet.at + outputs]
    if part.shape != wanted.shape:
        yield f"{outlet.module}: its shard in the graph is {list(part.shape)}, the trained one {list(wanted.shape)}"
    elif not np.array_equal(part, wanted):
        row, column = np.argwhere(part != wanted)[0]
        yield (
            f"{outlet.module}: its shard in the graph has {float(part[row, column]):g} at [{row}, {column}], the "
            f"trained one {float(wanted[row, column]):g}"
        )


def _gemm(value: Any) -> Any:
    """The branch's product behind a module's output, None where there is none."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "If":
            value = node.attributes["then_branch"].as_graph().outputs[value.index()]
            continue
        if node.op_type == "Gemm" and "/fossil/" in str(node.name):
            return node
        if node.op_type not in ("Reshape", "Add"):
            return None
        value = node.inputs[0]
    return None


def _parameters(path: Path) -> Mapping[str, Array]:
    ort = required("onnxruntime")
    try:
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        # Copied: the arrays look into memory that goes with `found`.
        return {name: np.array(value.numpy()) for name, value in found.items()}
    except Exception as problem:  # ONNX Runtime's own classes
        raise OnnxError(f"{path}: cannot be read; export the folder again") from problem
