"""The head of a GGUF file: its metadata and where its tensors lie, read and checked without the weights.

A file is "GGUF", version, counts, metadata (key, type, value), the table of tensors (name, sizes with the fastest
first, type, offset), then the tensors, each at a multiple of `general.alignment`. Format: docs/gguf.md in
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._extras import required
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import CheckpointError, unreadable

if TYPE_CHECKING:
    from fossil_export.checkpoints._folder import Folder

VERSIONS = (2, 3)
MOST = 1 << 26
"""Bytes of a head: more than any vocabulary needs."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALL = 1 << 12
"""Elements of an array whose values are kept; of a longer one only their number is."""
_PAIRS, _TENSORS = 1 << 16, 1 << 19
"""Far more than any model's."""
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it is stored: `shape` with the rows first, `kind` in gguf's GGMLQuantizationType, and the bytes of
    its rows, (rows, bytes of a row) as U8."""

    name: str
    shape: tuple[int, ...]
    kind: str
    codes: TensorInfo


@dataclass(frozen=True)
class GgufFile:
    """`head` is all that stands before the tensors; `entries` are the bytes of each metadata entry in it."""

    path: Path
    size: int
    head: bytes
    metadata: Mapping[str, Any]
    entries: Mapping[str, bytes]
    table: bytes
    alignment: int
    tensors: Mapping[str, Packed]

    @property
    def architecture(self) -> str:
        found: str = self.metadata["general.architecture"]
        return found

    def without(self, keys: set[str], more: Mapping[str, int]) -> bytes:
        """The head without these entries of the metadata, and with `more` numbers."""
        kept = [entry for key, entry in self.entries.items() if key not in keys | set(more)]
        kept += [
            struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<II", 4, value)
            for key, value in more.items()
        ]
        start = struct.pack("<4sIQQ", b"GGUF", VERSIONS[-1], len(self.tensors), len(kept))
        found = start + b"".join(kept) + self.table
        return found + bytes(-len(found) % self.alignment)


def read_gguf(home: Folder, name: str) -> GgufFile:
    """The head of the GGUF file `name`; raises CheckpointError for what is damaged, naming key or tensor, and
    MissingExtraError without the package that knows its types."""
    path = home.path / name
    if (part := _PART.search(name)) and int(part[1]) > 1:
        raise CheckpointError(
            f"{path}: is one of {int(part[1])} parts of a model; join them with llama-gguf-split --merge, and name the "
            "joined file"
        )
    try:
        size = home.size(name)
    except OSError as problem:
        raise CheckpointError(unreadable(path, problem)) from problem
    count = min(size, 1 << 20)
    while True:
        reader = _Reader(path, home.view(name, 0, count).tobytes(), count == min(size, MOST))
        try:
            return _parsed(reader, size)
        except _Short:
            count = min(size, MOST, count * 4)


class _Short(Exception):
    """The head goes on past what was read."""


class _Reader:
    """Takes values from the start of a file; `whole` says that there are no more bytes to be had."""

    def __init__(self, path: Path, data: bytes, whole: bool) -> None:
        self.path, self.data, self.whole, self.at = path, data, whole, 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; the file is cut or corrupt, fetch it again")

    def skip(self, count: int) -> int:
        """Pass over `count` bytes, and say where they begin."""
        start = self.at
        if start + count > len(self.data):
            if self.whole or count > MOST:
                raise self.error("ends within its head")
            raise _Short
        self.at += count
        return start

    def values(self, form: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{form}"
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))

    def number(self, form: str) -> int:
        found: int = self.values(form)[0]
        return found

    def string(self, what: str) -> str:
        count = self.number("Q")
        start = self.skip(count)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as problem:
            raise self.error(f"{what} is not UTF-8") from problem

    def value(self, key: str, kind: int) -> Any:
        """A value of the metadata; of a long array only its length."""
        if kind in _SCALARS:
            return self.values(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.error(f"{key} is of the unknown type {kind}")
        kind, count = self.values("I")[0], self.number("Q")
        if kind == _STRING:
            if count > MOST // 8:
                raise self.error(f"{key} has {count} words, which no head has room for")
            for _ in range(count):
                self.skip(self.number("Q"))
            return count
        if kind not in _SCALARS:
            raise self.error(f"{key} is an array of the unknown type {kind}")
        if count <= _SMALL:
            return list(self.values(_SCALARS[kind], count))
        self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        return count


def _parsed(reader: _Reader, size: int) -> GgufFile:
    if reader.data[:4] != b"GGUF":
        raise CheckpointError(f"{reader.path}: is no GGUF file: it does not begin with GGUF; fetch it again")
    reader.skip(4)
    version, tensors, pairs = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in VERSIONS:
        what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(f"{reader.path}: is a GGUF file that is {what}; convert the model again")
    if pairs > _PAIRS or tensors > _TENSORS:
        raise reader.error(f"claims {tensors:,} tensors and {pairs:,} entries of metadata")
    metadata: dict[str, Any] = {}
    entries: dict[str, bytes] = {}
    for number in range(pairs):
        start = reader.at
        key = reader.string(f"key {number}")
        if key in metadata:
            raise reader.error(f"{key} stands in it twice")
        metadata[key] = reader.value(key, reader.number("I"))
        entries[key] = reader.data[start : reader.at]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment is {alignment!r}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise reader.error("does not name its general.architecture")
    if metadata.get("general.type") == "adapter":
        raise CheckpointError(f"{reader.path}: is an adapter, not a base model; name the base model with --base")
    if isinstance(metadata.get("split.count"), int) and metadata["split.count"] > 1:
        raise CheckpointError(
            f"{reader.path}: is one of {metadata['split.count']} parts of a model; join them with llama-gguf-split "
            "--merge, and name the joined file"
        )
    start = reader.at
    table = list(_table(reader, tensors))
    end = -(-reader.at // alignment) * alignment
    head, raw = reader.data[: reader.at], reader.data[start : reader.at]
    found = _placed(reader, table, end, size, alignment)
    return GgufFile(reader.path, size, head, metadata, entries, raw, alignment, found)


def _table(reader: _Reader, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape (rows first), type and offset of each tensor."""
    for number in range(count):
        name = reader.string(f"the name of tensor {number}")
        dimensions = reader.number("I")
        if not 1 <= dimensions <= 4:
            raise reader.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(reader.values("Q", dimensions)))
        yield name, shape, reader.number("I"), reader.number("Q")


def _placed(
    reader: _Reader, table: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, alignment: int
) -> dict[str, Packed]:
    """The tensors by name, in the order in which they lie in the file. Each must lie in it, and on no other."""
    gguf = required("gguf", "gguf", "reading GGUF files")
    sizes = {int(kind): (kind.name, *pair) for kind, pair in gguf.GGML_QUANT_SIZES.items()}
    found: dict[str, Packed] = {}
    end, before = start, ""
    for name, shape, kind, offset in sorted(table, key=lambda one: one[3]):
        if name in found:
            raise reader.error(f"tensor {name} stands in it twice")
        if kind not in sizes:
            raise CheckpointError(
                f"{reader.path}: {name} is of the type {kind}, which the installed gguf does not know; update gguf"
            )
        label, block, nbytes = sizes[kind]
        if shape[-1] % block or not prod(shape):
            raise reader.error(f"tensor {name} {list(shape)} does not divide into blocks of {label}, which are {block}")
        row = shape[-1] // block * nbytes
        rows = prod(shape[:-1])
        place = start + offset
        if offset % alignment:
            raise reader.error(f"tensor {name} lies at byte {place}, which is not aligned to {alignment}")
        if place < end:
            raise reader.error(f"tensor {name} overlaps {before}")
        end, before = place + rows * row, name
        if end > size:
            raise reader.error(f"tensor {name} ends at byte {end}, the file at {size}")
        found[name] = Packed(name, shape, label, TensorInfo(name, "U8", (rows, row), reader.path, place))
    if not found:
        raise reader.error("holds no tensors")
    return found
