"""The shards of a graph with branches, value by value: what a Gemm multiplies by must be what was trained.

Computed on its own (by index, from the paper's formulas), not by the code that wrote the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export.adapters import Adapter, Trained
from fossil_export.errors import OnnxError, listed
from fossil_export.onnx._adapter_file import ADAPTER
from fossil_export.onnx._signature import Slot, read_branches, read_mark, read_outlets, read_signature
from fossil_export.onnx.builders._existing import find_graph
from fossil_export.onnx.graph._file import load_graph
from fossil_export.onnx.graph._match import Piece
from fossil_export.onnx.graph._weight import stored
from fossil_export.verifying._constants import check_saved
from fossil_export.verifying.reference import EXACT

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


def check_shards(folder: Path, adapter: Adapter) -> list[str]:
    """What is wrong with the shards of a fused or swappable graph, one line each; nothing for other modes."""
    graph = find_graph(folder)
    model = load_graph(graph)
    mark = read_mark(graph, model)
    if mark.get("mode") not in ("fused", "swappable"):
        return []
    return [*check_saved(model, adapter), *_check_branches(folder, graph, model, mark, adapter)]


def _check_branches(folder: Path, graph: Path, model: ir.Model, mark: Mapping[str, Any], adapter: Adapter) -> list[str]:
    if mark["mode"] == "swappable":
        slots = read_signature(graph).slots
        return [
            *_unknown(slots, adapter),
            *_check_slots(slots, _parameters(folder / ADAPTER), adapter, f" in {ADAPTER}"),
        ]
    if branches := read_branches(graph, mark):
        constants = {name: value.const_value for name, value in model.graph.initializers.items()}
        found = {
            name: stored(constants[name]) for slot in branches for name in (slot.name, slot.down) if name in constants
        }
        return [
            *_unknown(branches, adapter, "branches"),
            *_check_slots(branches, found, adapter, ""),
            *(line for slot in branches for line in _check_nodes(slot, model)),
        ]
    values = {value.name: value for node in model.graph for value in node.outputs}
    problems: list[str] = []
    for outlet in read_outlets(graph, mark):
        trained, node = adapter.trained.get(outlet.module), _gemm(values.get(outlet.value))
        if trained is not None and node is not None:
            piece = Piece(outlet.module, 0, outlet.at, outlet.count)
            problems += _compare(piece, stored(node.inputs[1].const_value), trained, adapter)
    return problems


def has_pairs(folder: Path) -> bool:
    """Whether the folder's graph has constants A and B, which can be compared with what was trained."""
    graph = find_graph(folder)
    return bool(read_branches(graph, read_mark(graph)))


def _unknown(slots: Sequence[Slot], adapter: Adapter, what: str = "inputs") -> Iterator[str]:
    known = {piece.module for slot in slots for piece in slot.pieces}
    if missing := [module for module in adapter.trained if module not in known]:
        yield f"the graph has no {what} for {listed(missing)}"


def _check_slots(slots: Sequence[Slot], found: Mapping[str, Array], adapter: Adapter, where: str) -> Iterator[str]:
    """The graph's values, by name, against what was trained."""
    for slot in slots:
        trained = [piece for piece in slot.pieces if piece.module in adapter.trained]
        names = [name for name in (slot.name, slot.down) if name]
        if missing := [name for name in names if name not in found]:
            if trained:
                yield f"{trained[0].module} has no shard{where}"
            elif len(missing) < len(names):
                yield f"{missing[0]} is missing{where}"
            continue
        values = found[slot.name]
        covered = np.zeros(values.shape, bool)
        if slot.down:
            yield from _compare_pairs(slot, trained, values, found[slot.down], covered, adapter)
        else:
            for piece in trained:
                yield from _compare(piece, values, adapter.trained[piece.module], adapter)
                covered[:, piece.at : piece.at + piece.count] = True
        if values[~covered].any():
            yield f"{slot.name}: has values for modules that were not trained"


def _compare_pairs(
    slot: Slot, pieces: Sequence[Piece], up: Array, down: Array, covered: Array, adapter: Adapter
) -> Iterator[str]:
    """B (r, out) and A (in, r) of a slot: each piece has rows of its own in B, after those of the one before, or those
    of one with the same A. Notes in `covered` which values of B were compared."""
    ranks: list[tuple[int, Array]] = []
    total = 0
    for piece in pieces:
        trained = adapter.trained[piece.module]
        wide = {role: np.asarray(array, np.float64) for role, array in adapter.arrays(piece.module).items()}
        wanted = EXACT[trained.method].down(wide, trained.numbers, slot.inputs)
        if wanted is None:
            yield f"{piece.module}: a {trained.method} update is no branch beside the weight"
            return
        wanted = np.asarray(wanted, np.float32)
        start = next((at for at, other in ranks if np.array_equal(other, wanted)), total)
        if start == total:
            ranks.append((start, wanted))
            total += len(wanted)
        rows = slice(start, start + len(wanted))
        yield from _differing(piece.module, "lora_A", down[:, rows], wanted.T.astype(down.dtype))
        yield from _compare(piece, up[rows], trained, adapter, "lora_B")
        covered[rows, piece.at : piece.at + piece.count] = True
    if pieces and (len(up) != total or down.shape != (slot.inputs, total)):
        yield (
            f"{slot.name}: is {list(up.shape)}, and {slot.down} {list(down.shape)}; the trained ones have rank {total}"
        )


def _check_nodes(slot: Slot, model: ir.Model) -> Iterator[str]:
    """Whether products of the graph read these constants, one after the other."""
    readers = [node for node in model.graph if any(v is not None and v.name == slot.name for v in node.inputs)]
    for node in readers:
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        down = before.inputs[1] if before is not None and before.op_type == "MatMul" else None
        if node.op_type != "Gemm" or down is None or down.name != slot.down:
            yield f"{slot.name}: is not multiplied by what {slot.down} gives"
    if not readers:
        yield f"{slot.name}: is in the graph, but nothing reads it"


def _compare(piece: Piece, found: Array, trained: Trained, adapter: Adapter, name: str = "shard") -> Iterator[str]:
    exactly = EXACT[trained.method]
    part = exactly.part(adapter.arrays(trained.module), piece.start, piece.start + piece.count)
    up = exactly.up({role: np.asarray(array, np.float64) for role, array in part.items()}, trained.numbers)
    if up is None:
        yield f"{piece.module}: a {trained.method} update is no branch beside the weight"
        return
    wanted = np.asarray(up.T, np.float32).astype(found.dtype)
    yield from _differing(piece.module, name, found[:, piece.at : piece.at + piece.count], wanted)


def _differing(module: str, name: str, there: Array, wanted: Array) -> Iterator[str]:
    if there.shape != wanted.shape:
        yield f"{module}: its {name} in the graph is {list(there.shape)}, the trained one {list(wanted.shape)}"
    elif not np.array_equal(there, wanted):
        row, column = np.argwhere(there != wanted)[0]
        yield (
            f"{module}: its {name} in the graph has {float(there[row, column]):g} at [{row}, {column}], the "
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
        adapter = ort.AdapterFormat.read_adapter(str(path))
        # Copied: the arrays look into memory that goes with `adapter`.
        return {name: np.array(value.numpy()) for name, value in adapter.get_parameters().items()}
    except Exception as problem:  # ONNX Runtime's own classes
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)[-200:]
        raise OnnxError(
            f"{path}: ONNX Runtime {ort.__version__} cannot read it ({reason}); export the folder again, or install a "
            "newer ONNX Runtime"
        ) from problem
