"""What adapters a swappable graph takes: inputs, modules, widths and which base it was made from.

It lies in the graph's own metadata, so that a graph without its folder still tells.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fossil_export.errors import OnnxError
from fossil_export.merging._plan import MergePlan
from fossil_export.onnx._trained import is_the_bases
from fossil_export.onnx.graph._file import MARK, load_graph
from fossil_export.onnx.graph._match import Piece
from fossil_export.onnx.graph._weight import FLOAT_NAMES

if TYPE_CHECKING:
    import onnx_ir as ir

    from fossil_export.onnx._places import OpenGraph, Place
    from fossil_export.onnx.graph._edit import Editor
    from fossil_export.onnx.graph._sites import Site

FORMAT = 1
SAMPLED = 4
"""Rows of each base weight that go into the fingerprint."""


@dataclass(frozen=True)
class Slot:
    """What a place takes: an optional input `name` (r, `outputs`) of the graph for a branch that sums its inputs, whose
    slots of one `kind` take one rank; or two, LoRA's B (r, `outputs`) and, as `down`, A (`inputs`, r), whose rank is
    this place's own. In a fused graph the two are constants."""

    name: str
    kind: str
    dtype: str
    inputs: int
    outputs: int
    pieces: tuple[Piece, ...]
    down: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The slot as the metadata holds it."""
        return {name: value for name, value in asdict(self).items() if name != "down" or value}


def lora_slot(place: Place, site: Site) -> Slot:
    """The slot of a place for A and B."""
    names = (f"{place.label}.lora_B", f"{place.label}.lora_A")
    sizes = (place.inputs, place.outputs)
    return Slot(names[0], place.kind, site.activation, *sizes, place.pieces, names[1])


@dataclass(frozen=True)
class Outlet:
    """Where a module's output is: columns [at, at + count) of a value of the graph."""

    module: str
    value: str
    at: int
    count: int


@dataclass(frozen=True)
class Signature:
    """`fingerprint` is of the base weights `tensors`; `saved` are digests of trained whole tensors in the graph."""

    slots: tuple[Slot, ...]
    fingerprint: str
    tensors: tuple[str, ...]
    base: str
    saved: Mapping[str, str]

    @property
    def inputs(self) -> dict[str, str]:
        """The names of the optional inputs and ONNX's types of them."""
        return {name: slot.dtype for slot in self.slots for name in (slot.name, slot.down) if name}

    @property
    def takes_lora(self) -> bool:
        """Whether its inputs are LoRA's, which what sums its inputs can be put into as well."""
        return all(slot.down for slot in self.slots)

    @property
    def version(self) -> int:
        """The fingerprint as adapter files can hold it, in `model_version`."""
        return int(self.fingerprint[:7], 16)


def mark(graph: OpenGraph, editor: Editor, slots: Sequence[Slot] = ()) -> None:
    """Write into the graph what was done to it and, with `slots`, what it takes or has in its branches."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "mode": graph.mode.name,
        "outlets": [asdict(outlet) for outlet in _outlets(graph, editor)],
    }
    if slots and not graph.mode.swaps:
        record["branches"] = [slot.to_dict() for slot in slots]
    elif slots:
        trained = graph.merge.modules
        signature = Signature(
            tuple(slots),
            fingerprint(graph.base_weights[module] for module in trained),
            tuple(tensor.name for tensor in trained.values()),
            graph.merge.base_name,
            saved_digests(graph.merge),
        )
        record["signature"] = asdict(signature) | {"slots": [slot.to_dict() for slot in slots]}
    record["sha256"] = _sum(record)
    graph.model.metadata_props[MARK] = json.dumps(record, separators=(",", ":"))


def _outlets(graph: OpenGraph, editor: Editor) -> Iterator[Outlet]:
    """The values that are modules' outputs after the rewriting, bias included."""
    biased = {name.removesuffix(".bias") for name in graph.merge.base.tensors if name.endswith(".bias")}
    names = {module: tensor.name.removesuffix(".weight") for module, tensor in graph.merge.modules.items()}
    for place in graph.places:
        node = graph.sites[place.label][0].node
        value = editor.replaced.get(id(node.outputs[0]), node.outputs[0])
        if any(names[piece.module] in biased for piece in place.pieces) and node.op_type != "Gemm":
            readers = list(value.consumers())
            if len(readers) != 1 or readers[0].op_type != "Add":
                continue
            value = readers[0].outputs[0]
        for piece in place.pieces:
            if piece.start == 0:
                yield Outlet(piece.module, str(value.name), piece.at, piece.count)


def read_mark(graph: Path, model: ir.Model | None = None) -> dict[str, Any]:
    """What fossil-export wrote into the graph's metadata; empty for a graph that it did not rewrite. Raises OnnxError
    when it is not what was written."""
    text = (model or load_graph(graph)).metadata_props.get(MARK)
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("sha256", "") not in ("", _sum(found)):
        raise _damaged(graph)
    return found


def _sum(record: Mapping[str, Any]) -> str:
    """Of all that the record says: a number that changed would put shards into other columns, and nobody would see."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode(errors="replace")).hexdigest()


def _damaged(graph: Path) -> OnnxError:
    return OnnxError(f"{graph}: its fossil_export metadata is damaged; export it again")


def read_signature(graph: Path) -> Signature:
    """The signature of a swappable graph. Raises OnnxError when it is none, damaged, or of another graph."""
    model = load_graph(graph)
    record = read_mark(graph, model)
    found = record.get("signature")
    if found is None or record.get("format") != FORMAT:
        what = f"was made in --mode {record['mode']}" if record.get("mode") else "was not made by fossil-export"
        raise OnnxError(f"{graph}: takes no adapters, it {what}; export it with --mode swappable")
    try:
        signature = Signature(**{**found, "slots": _slots(found["slots"]), "tensors": tuple(found["tensors"])})
        sound = re.fullmatch("[0-9a-f]{64}", signature.fingerprint) is not None
        sound &= all(isinstance(text, str) for text in (signature.base, *signature.tensors, *signature.saved.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise _damaged(graph) from problem
    if not sound:
        raise _damaged(graph)
    given = {value.name: value for value in model.graph.inputs}
    for slot in signature.slots:
        for name, at, size in ((slot.name, 1, slot.outputs), (slot.down, 0, slot.inputs)):
            if name and not _is_input(given.get(name), slot.dtype, at, size):
                raise OnnxError(f"{graph}: has no input {name} as its fossil_export metadata tells; export it again")
    return signature


def _is_input(value: Any, dtype: str, at: int, size: int) -> bool:
    """Whether an input of the graph takes a matrix of this type with `size` along `at`."""
    if value is None or value.dtype is None or value.dtype.name != dtype:
        return False
    if value.shape is None:
        return True
    sizes = list(value.shape)
    return len(sizes) == 2 and (not isinstance(sizes[at], int) or sizes[at] == size)


def read_branches(graph: Path, record: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The constants A and B of a fused graph with that record. Raises OnnxError when it is damaged."""
    try:
        return _slots(record.get("branches", ()))
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise _damaged(graph) from problem


def read_outlets(graph: Path, record: Mapping[str, Any]) -> tuple[Outlet, ...]:
    """Where the graph with that record has the modules' outputs. Raises OnnxError when it is damaged."""
    try:
        return tuple(_typed(Outlet(**entry)) for entry in record.get("outlets", ()))
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise _damaged(graph) from problem


def _slots(entries: Iterable[Mapping[str, Any]]) -> tuple[Slot, ...]:
    """Raises one of the errors above for what no graph has."""
    slots = tuple(
        _typed(Slot(**{**entry, "pieces": tuple(_typed(Piece(**piece)) for piece in entry["pieces"])}))
        for entry in entries
    )
    for slot in slots:
        columns = sorted((piece.at, piece.at + piece.count) for piece in slot.pieces)
        if slot.dtype not in FLOAT_NAMES or any(end > start for (_, end), (start, _) in pairwise(columns)):
            raise ValueError(slot)
        if not columns or columns[-1][1] > slot.outputs:
            raise ValueError(slot)
    return slots


_Entry = TypeVar("_Entry", Slot, Piece, Outlet)


def _typed(entry: _Entry) -> _Entry:
    """The entry; raises TypeError unless its texts are texts and its numbers sizes."""
    for field in fields(entry):
        value = getattr(entry, field.name)
        if field.type == "str" and not isinstance(value, str):
            raise TypeError(field.name)
        if field.type == "int" and (type(value) is not int or not 0 <= value < 2**40):
            raise TypeError(field.name)
    return entry


def fingerprint(weights: Iterable[Any]) -> str:
    """SHA-256 of a few rows of each weight, in float32: tells models of the same shapes apart."""
    digest = hashlib.sha256()
    for weight in weights:
        rows = np.unique(np.linspace(0, len(weight) - 1, SAMPLED).astype(int))
        digest.update(np.ascontiguousarray(weight[rows], np.float32).tobytes())
    return digest.hexdigest()


def saved_digests(plan: MergePlan) -> dict[str, str]:
    """SHA-256 of each whole tensor that comes with the adapter and stands in the graph; of one that is also trained
    beside, only if it is not the base's."""
    whole = {
        tensor.name: digest(plan.adapter.array(tensor.source))
        for tensor in plan.tensors
        if tensor.owner is not None and (tensor.action != "merge" or not is_the_bases(plan, tensor))
    }
    pieces = [(f"{tensor.name}[{one.first}]", one.source) for tensor in plan.tensors for one in tensor.pieces]
    return whole | {name: digest(plan.adapter.array(info)) for name, info in pieces}


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()
