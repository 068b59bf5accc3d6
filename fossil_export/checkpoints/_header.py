"""Safetensors headers: read, checked before anything is believed, and written.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes without gaps or
overlaps. Format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import BITS, byte_count, element_count
from fossil_export.checkpoints._jsonfile import load_json
from fossil_export.checkpoints._stamp import Stamp
from fossil_export.errors import CheckpointError, FossilExportError, unreadable

if TYPE_CHECKING:
    from fossil_export.checkpoints._coding import Coding

MAX_HEADER = 100_000_000
"""Bytes; the same bound as the safetensors library's."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    `offset` is absolute in `path`, in bytes; None when the tensor is not a byte range of a file (pickled
    adapters), in which case the owner keeps the array, and `first` is the element of it with which this begins. One
    with a `coding` is not stored as it is (quantized weights): its values are computed from other tensors, it has no
    offset either, and `path` is where the first of these lie.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int | None
    first: int = 0
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        return byte_count(self.dtype, self.shape)


def slice_of(info: TensorInfo, first: int, count: int, shape: tuple[int, ...]) -> TensorInfo:
    """Elements [first, first + count) of a tensor, in its own order, as one of this `shape`.

    It keeps the name. The dtype must be one whose elements are whole bytes. Raises CheckpointError if there are no such
    elements, or others than `shape` wants.
    """
    if not 0 <= first <= first + count <= element_count(info.shape) or element_count(shape) != count:
        raise CheckpointError(
            f"{info.path}: {info.name} {list(info.shape)} has no part {list(shape)} at element {first}; its "
            "config.json describes another"
        )
    if info.offset is None:
        return replace(info, shape=shape, first=info.first + first)
    return replace(info, shape=shape, offset=info.offset + first * (BITS[info.dtype] // 8))


@dataclass(frozen=True, slots=True)
class Header:
    """One safetensors file: `encoded` is what stands before the tensors, `size` the whole file in bytes.

    `stamp` tells the file that was read from a later one at the same path; None for a header that came alone, by a
    range of a file on the Hub. The tensors of one that is `derived` are not those that `encoded` tells of. A merged
    file is called `written_as`, where it cannot have the name of this one.
    """

    path: Path
    encoded: bytes
    size: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    stamp: Stamp | None = None
    derived: bool = False
    written_as: str = ""

    @property
    def output_name(self) -> str:
        return self.written_as or self.path.name


def read_header(path: Path, error: type[FossilExportError] = CheckpointError) -> Header:
    """Read and check the header of a safetensors file; a few kilobytes, never the weights.

    Raises `error` with the file, the tensor and what is wrong.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size, prefix = status.st_size, file.read(8)
            encoded = prefix + file.read(header_length(path, prefix, size, error) - 8)
        return replace(parse_header(path, encoded, size, error), stamp=Stamp.of(status))
    except OSError as problem:
        raise error(unreadable(path, problem)) from problem


def header_length(path: Path, prefix: bytes, size: int, error: type[FossilExportError] = CheckpointError) -> int:
    """Bytes before the tensors of a file of `size` bytes that begins with the 8 bytes `prefix`; raises `error`."""
    if len(prefix) < 8:
        raise _broken(path, error, f"{size} bytes are too few for a safetensors file")
    count = int.from_bytes(prefix, "little")
    if count > MAX_HEADER or count > size - 8:
        raise _broken(path, error, f"the header claims {count} bytes, the file has {size}")
    return 8 + count


def parse_header(path: Path, encoded: bytes, size: int, error: type[FossilExportError] = CheckpointError) -> Header:
    """Check the header `encoded` (all bytes before the tensors) of the file at `path`, which has `size` bytes."""

    def broken(what: str) -> FossilExportError:
        return _broken(path, error, what)

    try:
        entries = load_json(encoded[8:], _without_repeats)
    except (ValueError, RecursionError) as problem:
        raise broken(f"the header is not valid JSON ({problem})") from problem
    if not isinstance(entries, dict):
        raise broken("the header is not a JSON object")
    if encoded[8:9] != b"{":  # the library reads no other, and the header is copied as it is
        raise broken("the header does not begin with a brace")

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken("__metadata__ is not a map of strings")
    start = len(encoded)
    tensors = sorted((_tensor(path, start, name, entry, broken) for name, entry in entries.items()), key=_position)
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem_name = "overlaps the one before it" if (tensor.offset or 0) < end else "leaves a gap before it"
            raise broken(f"tensor {tensor.name} {problem_name}")
        end += tensor.nbytes
    if end != size:
        raise broken(f"the tensors end at byte {end}, the file at {size}")
    return Header(path, encoded, size, tuple(tensors), metadata)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensors, for `(name, dtype, shape)` laid out in the given order without gaps.

    Padded with spaces to a multiple of 8, as the safetensors library does.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + byte_count(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _broken(path: Path, error: type[FossilExportError], what: str) -> FossilExportError:
    return error(f"{path}: {what}; the file is cut or corrupt, fetch or save it again")


def _position(tensor: TensorInfo) -> tuple[int, int]:
    # An empty tensor shares its offset with the next one and comes first.
    return (tensor.offset or 0, tensor.nbytes)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return entries


def _tensor(path: Path, start: int, name: str, entry: Any, broken: Any) -> TensorInfo:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as problem:
        raise broken(f"tensor {name} lacks dtype, shape or data_offsets") from problem
    try:
        name.encode()
    except UnicodeEncodeError as problem:
        raise broken(f"tensor {name!r} has a name that is not UTF-8") from problem
    if not isinstance(dtype, str) or dtype not in BITS:
        raise broken(f"tensor {name} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list):
        raise broken(f"tensor {name} has no list of sizes as its shape")
    numbers = [*shape, first, last]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise broken(f"tensor {name} has a shape or offsets that are not natural numbers")
    info = TensorInfo(name, dtype, tuple(shape), path, start + first)
    if last - first != info.nbytes:
        raise broken(f"tensor {name} is {dtype} {shape}, {info.nbytes} bytes, but its offsets span {last - first}")
    return info
