"""The two forms of PyTorch's files, and where in them the bytes of each storage are.

Since 1.6 a file is a zip archive: `NAME/data.pkl`, `NAME/byteorder`, and one uncompressed entry `NAME/data/KEY` for
each storage. Before, it was five pickles (a magic number, a version, the machine, the object, the storages' keys), and
then each storage: 8 bytes that count its elements, and these. Source: torch/serialization.py.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

from fossil_export.checkpoints._dtypes import BITS, numpy_dtype
from fossil_export.checkpoints._header import MAX_HEADER, Header, TensorInfo
from fossil_export.checkpoints._stamp import Stamp
from fossil_export.checkpoints.pickled._machine import BadPickleError, CutError, read_pickle
from fossil_export.checkpoints.pickled._state import Placed, Storage, tensors_of
from fossil_export.checkpoints.pickled._strided import Strided
from fossil_export.errors import CheckpointError, FossilExportError, unreadable

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_ROOM, _TIMES = 1 << 24, 16
"""Bytes of tensors that a file may tell of, and how many times its own: tensors may share values or repeat them, but
not so that a small file fills memory or disk."""
_METADATA = {"format": "pt"}
"""What transformers writes into safetensors files, and looks for when it loads them."""

Find = Callable[[Storage], int]


@dataclass(frozen=True)
class _Opened:
    """The object of a file, the bytes that stand before the storages (b"" if these come first), and where a storage's
    bytes begin; `find` raises BadPickleError."""

    state: Any
    beginning: bytes
    find: Find


def read_pickle_header(path: Path, error: type[FossilExportError] = CheckpointError) -> Header:
    """The tensors of a state dict that `torch.save` wrote: names, dtypes, shapes and places; never the weights.

    A tensor that does not lie in its own order is coded (`Strided`). Raises `error` for what is no plain state dict.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            found = parse_pickle_header(path, file, status.st_size, error)
    except OSError as problem:
        raise error(unreadable(path, problem)) from problem
    return replace(found, stamp=Stamp.of(status))


def parse_pickle_header(
    path: Path, file: BinaryIO, size: int, error: type[FossilExportError] = CheckpointError, far: bool = False
) -> Header:
    """The same of an open file of `size` bytes; of one that is `far` few ranges are read."""
    try:
        opened = _archive(file, size, far) if file.read(4) == b"PK\x03\x04" else _legacy(file, size, far)
        tensors = tuple(_info(path, one, opened.find) for one in tensors_of(opened.state))
        if (told := sum(info.nbytes for info in tensors)) > _ROOM + _TIMES * size:
            raise BadPickleError(
                f"tells of tensors of {told:,} bytes, which repeat values of a file of {size:,}; save them with "
                ".contiguous()"
            )
    except BadPickleError as problem:
        hint = "" if ";" in str(problem) else "; it is cut or corrupt, fetch or save it again"
        raise error(f"{path}: {problem}{hint}") from problem
    return Header(path, opened.beginning, size, tensors, _METADATA, derived=True)


def _info(path: Path, one: Placed, find: Find) -> TensorInfo:
    size = BITS[one.dtype] // 8
    offset = find(one.storage) + one.first * size if one.span else 0
    if one.is_contiguous:
        return TensorInfo(one.name, one.dtype, one.shape, path, offset)
    try:
        numpy_dtype(one.dtype)
    except KeyError as problem:
        raise BadPickleError(
            f"tensor {one.name!r} {list(one.shape)} is {one.dtype} and not contiguous; save it with .contiguous()"
        ) from problem
    elements = TensorInfo(one.name, one.dtype, (one.span,), path, offset)
    shape, strides = ((1, *one.shape), (0, *one.strides)) if len(one.shape) == 1 else (one.shape, one.strides)
    return TensorInfo(one.name, one.dtype, one.shape, path, None, coding=Strided(elements, shape, strides))


class _Bounded:
    """A file of which no more is read at once than a pickle or a list of entries may have."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read
        self.most = MAX_HEADER // 3

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise BadPickleError(f"has a list of entries of {count:,} bytes, too many for tensors")
        return self._read(count)


def _archive(file: BinaryIO, size: int, far: bool) -> _Opened:
    try:
        bounded = _Bounded(file)
        with zipfile.ZipFile(cast(BinaryIO, bounded)) as archive:
            bounded.most = MAX_HEADER
            entries = {entry.filename: entry for entry in archive.infolist()}
            if not any(entry.CRC for entry in entries.values()):  # set_crc32_options(False)
                for entry in entries.values():
                    del entry.CRC  # zipfile then compares none
            if len(entries) < len(archive.infolist()):
                raise BadPickleError("has two entries of one name")
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise BadPickleError("is a zip archive, but none that PyTorch writes; name the model's weights")
            root = pickles[0].removesuffix("data.pkl")
            _check_whole(file, archive, size)
            if (other := next((name for name in entries if not name.startswith(root)), None)) is not None:
                raise BadPickleError(f"has the entry {other[:80]!r} outside of {root}, which PyTorch never writes")
            if f"{root}version" not in entries:
                raise BadPickleError(f"has no {root}version, which PyTorch always writes")
            if any(name.startswith(f"{root}code/") or name == f"{root}constants.pkl" for name in entries):
                raise BadPickleError("is a TorchScript program, not a state dict; save model.state_dict() of the model")
            if (order := entries.get(f"{root}byteorder")) is not None and (
                order.file_size > 16 or archive.read(order) != b"little"
            ):
                raise BadPickleError("was written on a big-endian machine; load it there and save it as safetensors")
            main = entries[pickles[0]]
            if main.file_size > MAX_HEADER:
                raise BadPickleError(f"has a pickle of {main.file_size:,} bytes, too many for names of tensors")
            for entry in entries.values():
                _stored(entry)
            data = archive.read(main)
            starts = sorted(entry.header_offset for entry in entries.values())
            aligned = entries.get(f"{root}.storage_alignment")
            usual = aligned is None or (aligned.file_size == 2 and archive.read(aligned) == b"64")
            after = dict(pairwise([*starts, archive.start_dir])) if far and usual else {}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as problem:
        raise BadPickleError(f"is no sound zip archive ({problem})") from problem
    state, _ = read_pickle(data)
    end = _start_of(file, main, size) + len(data)
    file.seek(0)
    beginning = file.read(end) if end <= len(data) + 4096 else b""

    def find(storage: Storage) -> int:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise BadPickleError(f"lacks its storage {storage.key[:40]!r}")
        if entry.file_size != storage.nbytes:
            raise BadPickleError(f"has {entry.file_size} bytes in storage {storage.key}, not {storage.nbytes}")
        aligned = _aligned_start(entry, after[entry.header_offset]) if after else None
        return _start_of(file, entry, size) if aligned is None else aligned

    return _Opened(state, beginning, find)


def _check_whole(file: BinaryIO, archive: zipfile.ZipFile, size: int) -> None:
    """The first entry is the file's beginning, and the directory its end: else it is of two files, say."""
    file.seek(max(0, size - 22 - len(archive.comment)))
    if file.read(4) != b"PK\x05\x06" or min(entry.header_offset for entry in archive.infolist()) != 0:
        raise BadPickleError("has bytes before its first entry or after its last")


def _aligned_start(entry: zipfile.ZipInfo, end: int) -> int | None:
    """Where the bytes of an entry begin that ends at `end`, told without reading its own header: PyTorch puts them at
    a multiple of 64, and 16 bytes that repeat their size after them (24 in a large file, none after nothing). None if
    others wrote the file, who leave other room before them: they do not mark plain names as UTF-8."""
    if entry.flag_bits != 0x808:
        return None
    first = entry.header_offset + 30 + len(entry.filename.encode())
    found = [start for after in (0, 16, 24) if (start := end - after - entry.file_size) % 64 == 0 and start >= first]
    stored = entry.compress_type == zipfile.ZIP_STORED
    return found[0] if stored and len(found) == 1 else None


def _stored(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise BadPickleError(f"has {entry.filename} compressed or encrypted; load it with PyTorch and save it again")
    if entry.compress_size != entry.file_size:
        raise BadPickleError(f"has {entry.filename} with two sizes, {entry.file_size} and {entry.compress_size}")


def _start_of(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of an entry begin; they must be stored as they are."""
    _stored(entry)
    file.seek(entry.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise BadPickleError(f"has no entry {entry.filename} where it should be")
    start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if start + entry.file_size > size:
        raise BadPickleError(f"ends within {entry.filename}")
    return start


def _legacy(file: BinaryIO, size: int, far: bool) -> _Opened:
    data, room = b"", 1 << 20
    while True:
        file.seek(0)
        data = file.read(min(room, MAX_HEADER))
        try:
            state, keys, end = _pickles(data)
            break
        except CutError:
            if room >= min(size, MAX_HEADER):
                raise
            room *= 8
    storages = {one.storage.key: one.storage for one in tensors_of(state)}
    places: dict[str, tuple[int, int]] = {}
    at = end
    for key in keys:
        if key not in storages:
            raise BadPickleError(f"has a storage {key!r} that no tensor takes; load it with PyTorch and save it again")
        nbytes = storages[key].nbytes
        if not far:
            file.seek(at)
            nbytes = int.from_bytes(file.read(8), "little") * storages[key].width
        places[key] = at + 8, nbytes
        at += 8 + nbytes
        if at > size:
            raise BadPickleError(f"ends within storage {key}")
    if at != size:
        raise BadPickleError(f"has {size - at} bytes after its storages")

    def find(storage: Storage) -> int:
        start, nbytes = places.get(storage.key, (0, -1))
        if nbytes != storage.nbytes:
            raise BadPickleError(f"has not the {storage.nbytes} bytes of storage {storage.key}")
        return start

    return _Opened(state, data[:end], find)


def _pickles(data: bytes) -> tuple[Any, list[str], int]:
    """The object, the keys of its storages in their order, and where these begin."""
    if data.startswith(b"version https://git-lfs"):
        raise BadPickleError("is a pointer of Git LFS, not the file itself; fetch that (git lfs pull)")
    if not data:
        raise BadPickleError("is empty; fetch it again")
    if data[:1] != b"\x80" or (first := read_pickle(data))[0] != _MAGIC:
        raise BadPickleError("is no file of PyTorch's; fetch it again, or name the weights")
    version, at = read_pickle(data, first[1])
    machine, at = read_pickle(data, at)
    if version != _VERSION or type(machine) is not dict:
        raise BadPickleError(f"is of version {version!r} of PyTorch's files; load it with PyTorch and save it again")
    if machine.get("little_endian") is not True:
        raise BadPickleError("was written on a big-endian machine; load it there and save it as safetensors")
    state, at = read_pickle(data, at)
    keys, at = read_pickle(data, at)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise BadPickleError("has no list of its storages")
    return state, keys, at
