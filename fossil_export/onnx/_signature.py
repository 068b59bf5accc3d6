"""What adapters a swappable graph takes: inputs, modules, widths and which base it was made from.

It lies in the graph's own metadata, so that a graph without its folder still tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.errors import OnnxError
from fossil_export.merging._plan import MergePlan
from fossil_export.onnx._trained import is_the_bases
from fossil_export.onnx.graph._file import MARK, load_graph
from fossil_export.onnx.graph._match import Piece

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
    """What fossil-export wrote into the graph's metadata; empty for a graph that it did not rewrite."""
    text = (model or load_graph(graph)).metadata_props.get(MARK)
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OnnxError(f"{graph}: its fossil_export metadata is damaged; export it again")
    return found


def read_signature(graph: Path) -> Signature:
    """The signature of a swappable graph. Raises OnnxError when it is none, or damaged."""
    record = read_mark(graph)
    try:
        found = record.get("signature")
        if found is not None and record["format"] == FORMAT:
            return Signature(**{**found, "slots": _slots(found["slots"]), "tensors": tuple(found["tensors"])})
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise OnnxError(f"{graph}: its fossil_export metadata is damaged; export it again") from problem
    what = f"was made in --mode {record['mode']}" if record.get("mode") else "was not made by fossil-export"
    raise OnnxError(f"{graph}: takes no adapters, it {what}; export it with --mode swappable")


def read_branches(graph: Path, record: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The constants A and B of a fused graph with that record. Raises OnnxError when it is damaged."""
    try:
        return _slots(record.get("branches", ()))
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise OnnxError(f"{graph}: its fossil_export metadata is damaged; export it again") from problem


def _slots(entries: Iterable[Mapping[str, Any]]) -> tuple[Slot, ...]:
    return tuple(Slot(**{**entry, "pieces": tuple(Piece(**piece) for piece in entry["pieces"])}) for entry in entries)


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
