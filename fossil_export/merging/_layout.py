"""How the merged tensors lie in files: the base's own layout, or one cut anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._choice import INDEX_ENDING
from fossil_export.checkpoints._dtypes import BITS, TORCH_NAME, byte_count, element_count
from fossil_export.checkpoints._header import Header, TensorInfo, encode_header
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.checkpoints.quantized._trained_on import AS_TRAINED
from fossil_export.merging._change import Change, Part, Piece, parts_of


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the merged model: `source`'s values and those of `pieces`, with `changes` to the matrices in it, as
    `dtype`.

    `owner` is the number of the adapter that `source` comes with, None for the base's; `added` says that the base has
    no tensor of that name. One that `encodes` a weight, which the base has as `coded`, has it quantized again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    owner: int | None = None
    changes: tuple[Change, ...] = ()
    pieces: tuple[Piece, ...] = ()
    added: bool = False
    encodes: TensorPlan | None = None
    coded: TensorInfo | None = None

    @property
    def weight(self) -> TensorPlan:
        """The floats that it holds: itself, or what it encodes."""
        return self.encodes or self

    @property
    def leads(self) -> bool:
        """Whether it has the codes of what it encodes, and not what is beside them."""
        return self.coded is None or self.coded.coding is None or self.coded.coding.stored[0].name == self.name

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its matrices that change, its pieces, and what lies between them."""
        return tuple(parts_of(self.shape, self.changes, self.pieces))

    def origin(self, part: Part) -> tuple[TensorInfo, int | None]:
        """The tensor that a part has its values from, and the number of the adapter that it comes with."""
        return (self.source, self.owner) if part.piece is None else (part.piece.source, part.piece.adapter)

    @property
    def brought(self) -> tuple[TensorInfo, ...]:
        """What adapters brought of it, whole tensors or slices of them."""
        return ((self.source,) if self.owner is not None else ()) + tuple(piece.source for piece in self.pieces)

    @property
    def action(self) -> str:
        """merge, add, replace, requantize, dequantize, cast or copy."""
        if self.encodes is not None:
            return "requantize"
        if self.changes:
            return "merge"
        if self.added:
            return "add"
        if self.brought:
            return "replace"
        if is_decoded(self.source):
            return "dequantize"
        return "copy" if self.dtype == self.source.dtype else "cast"

    @property
    def nbytes(self) -> int:
        return byte_count(self.dtype, self.shape)


def read_for(tensor: TensorPlan) -> Iterator[Path]:
    """The files that its values are read from, some of them more than once."""
    infos = [tensor.source, *(one for change in tensor.weight.changes for one in change.into.stored)]
    infos += [] if tensor.coded is None else [tensor.coded]
    infos += [] if tensor.encodes is None else [tensor.encodes.source]
    for info in infos:
        yield info.path
        if info.coding is not None:
            yield from (one.path for one in info.coding.stored)


def is_decoded(info: TensorInfo) -> bool:
    """Whether a tensor's values are computed from codes; others with a coding just lie in another order. (Codes may be
    stored as if they were floats of the same dtype, but not without their scales.)"""
    coding = info.coding
    if coding is None:
        return False
    return isinstance(coding, AS_TRAINED) or coding.stored[0].dtype != info.dtype or len(coding.stored) > 1


def tensor_record(tensor: TensorPlan) -> dict[str, Any]:
    """One tensor of the plan for JSON: what is done to it and from what."""
    record: dict[str, Any] = {
        "tensor": tensor.name,
        "action": tensor.action,
        "dtype": TORCH_NAME.get(tensor.dtype, tensor.dtype),
        "shape": list(tensor.shape),
    }
    if tensor.source.name != tensor.name or tensor.owner is not None:
        record["source"] = {"of": "base" if tensor.owner is None else "adapter", "tensor": tensor.source.name}
    if tensor.pieces:
        record["pieces"] = [_piece_record(piece) for piece in tensor.pieces]
    found = [_change_record(change) for change in tensor.weight.changes]
    return record | found[0] if len(found) == 1 else record | ({"changes": found} if found else {})


def _piece_record(piece: Piece) -> dict[str, Any]:
    record: dict[str, Any] = {"elements": [piece.first, piece.last], "tensor": piece.source.name}
    return record | ({"adapter": piece.adapter} if piece.adapter else {})


def _change_record(change: Change) -> dict[str, Any]:
    names = {role: info.name for role, info in change.trained.tensors.items()}
    record: dict[str, Any] = {"module": change.trained.module}
    record |= {"shard": next(iter(names.values()))} if len(names) == 1 else {"trained": names}
    if change.adapter:
        record["adapter"] = change.adapter
    return record | ({"weight": change.weight} if change.weight != 1.0 else {})


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: the bytes of its header, its tensors with their offsets in it, its size in bytes."""

    name: str
    header: bytes
    tensors: tuple[tuple[TensorPlan, int], ...]
    size: int


def lay_out(
    base: Checkpoint, by_file: Mapping[str, list[TensorPlan]], max_shard_size: int | None
) -> tuple[tuple[FilePlan, ...], tuple[str, bytes] | None]:
    """The files of the merged model and its index as (name, content), None for a single file.

    Without `max_shard_size` (bytes) names and order are the base's, and so is every header and the index
    wherever no tensor changed its dtype or shape or was added.
    """
    if max_shard_size is not None:
        by_file = _cut([tensor for tensors in by_file.values() for tensor in tensors], max_shard_size)
    headers = {header.output_name: header for header in base.files}
    metadata = base.files[0].metadata
    files = tuple(_file(name, tensors, headers.get(name), metadata) for name, tensors in by_file.items())
    if (len(files) == 1 and base.index is None) or (len(files) == 1 and max_shard_size is not None):
        return files, None
    return files, _index(base, files)


def _cut(tensors: list[TensorPlan], limit: int) -> dict[str, list[TensorPlan]]:
    """Fill files in order up to `limit` bytes of tensors; a larger tensor has a file of its own."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def _file(name: str, tensors: list[TensorPlan], header: Header | None, metadata: Mapping[str, str]) -> FilePlan:
    if header is not None and _unchanged(tensors, header):
        encoded = header.encoded
    else:
        # Widest dtypes first, otherwise in order, so that every tensor stays aligned to its elements.
        tensors = sorted(tensors, key=lambda tensor: -BITS[tensor.dtype])
        own = header.metadata if header is not None else metadata
        encoded = encode_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), own)
    offsets = list(accumulate((tensor.nbytes for tensor in tensors), initial=len(encoded)))
    return FilePlan(name, encoded, tuple(zip(tensors, offsets, strict=False)), offsets[-1])


def _unchanged(tensors: Iterable[TensorPlan], header: Header) -> bool:
    if header.derived:
        return False
    return [(t.name, t.dtype, t.shape) for t in tensors] == [(t.name, t.dtype, t.shape) for t in header.tensors]


def _index(base: Checkpoint, files: tuple[FilePlan, ...]) -> tuple[str, bytes]:
    name = "model.safetensors.index.json"
    if base.index_path is not None and base.index_path.name.endswith(INDEX_ENDING):
        name = base.index_path.name
    weight_map = {tensor.name: file.name for file in files for tensor, _ in file.tensors}
    old: Mapping[str, Any] = base.index or {}
    total = sum(tensor.nbytes for file in files for tensor, _ in file.tensors)
    before = sum(tensor.nbytes for tensor in base.tensors.values())
    if base.index_path is not None and weight_map == old.get("weight_map") and total == before:
        return name, base.home.read(name)
    metadata = dict(old.get("metadata") or {}) | {"total_size": total}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(element_count(tensor.shape) for file in files for tensor, _ in file.tensors)
    return name, write_json({**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
