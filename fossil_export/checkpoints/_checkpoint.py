"""A base model: its weights files, index and config, as they were opened, here or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import stored_dtype
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._source import ReadInPlace, open_source
from fossil_export.checkpoints._stamp import Stamp
from fossil_export.checkpoints.layouts import find_matrix
from fossil_export.errors import naming

BY_COLUMNS = ("awq", "gptq", "gguf", "mxfp4")
"""Formats of `quantized.FORMATS` in which a few rows of a weight lie all over what is stored of it."""


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint is quantized: the `format` (a key of `quantized.FORMATS`), the `settings` that its config has
    for it, and the checkpoint as it is `stored`."""

    format: str
    settings: Mapping[str, Any]
    stored: Checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model and the folder they lie in.

    `home` is the folder that all of it is read from; `folder` is None for a lone weights file, which has no companions
    (config, tokenizer). `index_path` is None when one file holds everything. `stamps` are those of index and config
    from before they were read. `found` keeps what others work out of it.

    Of a model whose weights are `quantized`, tensors and config are those of the dequantized model. `made_of` is the
    file that `folder` was made of, a temporary one then; `notes` is what the user should know, complete once the files
    of `home` have been listed.
    """

    home: Folder
    folder: Path | None
    files: tuple[Header, ...]
    index_path: Path | None
    index: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    quantized: Quantized | None = None
    made_of: Path | None = None
    notes: Sequence[str] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False, compare=False)
    found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.location}: {len(self.tensors)} tensors, {self.nbytes:,} bytes>"

    @property
    def location(self) -> Path:
        if self.made_of is not None:
            return self.made_of
        return self.folder if self.folder is not None else self.files[0].path

    @property
    def can_stay(self) -> bool:
        """Whether reading its weights by ranges, where they lie, reads each byte about once."""
        return self.quantized is None or self.quantized.format not in BY_COLUMNS

    @property
    def nbytes(self) -> int:
        """Size of all weights files together, headers included."""
        return sum(header.size for header in self.files)


class WeightRows:
    """The weight `name` (out, in) of a checkpoint, of which some rows are read: `rows[indices]`, wherever they lie.

    It must be one that a layout knows.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        matrix = find_matrix(name, checkpoint.tensors, checkpoint.config)
        assert matrix is not None, name
        self._home, self._matrix = checkpoint.home, matrix

    def __len__(self) -> int:
        return self._matrix.shape[0]

    def __getitem__(self, rows: Iterable[int]) -> Any:
        import numpy as np

        if self._matrix.unit(1) > 1 or self._matrix.stored[0].coding is not None:  # it cannot be had by rows
            return self._matrix.read(self._rows_of, 0, len(self))[:][list(rows)]
        return np.concatenate([self._matrix.read(self._rows_of, int(row), int(row) + 1)[:] for row in rows])

    def _rows_of(self, info: TensorInfo, start: int, stop: int) -> Any:
        return read_rows(info, start, stop, partial(view_rows, self._home))


def view_rows(home: Folder, info: TensorInfo, start: int, stop: int) -> Any:
    """Rows [start, stop) of a stored tensor's first axis, read from its folder."""
    size = info.nbytes // max(1, info.shape[0])
    raw = home.view(info.path.name, (info.offset or 0) + start * size, (stop - start) * size)
    return raw.view(stored_dtype(info.dtype)).reshape(stop - start, *info.shape[1:])


def identity(checkpoint: Checkpoint, full: bool = False) -> list[dict[str, Any]]:
    """What tells this base from another, without reading its weights a second time.

    Per weights file: name, size, SHA-256 of its header and, in a Hub cache, the blob's id (for large files
    the SHA-256 of the whole). `full` adds the SHA-256 of each whole file, at the cost of reading it.
    """
    records = []
    for header in checkpoint.files:
        record: dict[str, Any] = {
            "file": header.path.name,
            "size": header.size,
            "header_sha256": hashlib.sha256(header.encoded).hexdigest(),
        }
        if blob := checkpoint.home.blob(header.path.name):
            record["hub_blob"] = blob
        in_place = checkpoint.home if isinstance(checkpoint.home, ReadInPlace) else None
        if in_place is not None and (etag := in_place.etag(header.path.name)):
            record["etag"] = etag
        if full:
            known = blob is not None and len(blob) == 64 and not header.path.is_file()
            if in_place is not None:
                record["sha256"] = _sha256_of(checkpoint.home, header)
                records.append(record)
                continue
            if not known:  # the Hub has small files in git, by another hash
                checkpoint.home.fetch([header.path.name])
            record["sha256"] = blob if known else sha256(header.path)
        records.append(record)
    return records


def hub_revision(path: Path) -> str | None:
    """The commit a Hub cache's snapshot folder stands for: `.../snapshots/<commit>`; None elsewhere."""
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
        return folder.name
    return None


def _sha256_of(home: Folder, header: Header) -> str:
    """Hex digest of a file where it lies."""
    import numpy as np

    digest, buffer = hashlib.sha256(), np.empty(1 << 22, np.uint8)
    with closing(open_source(home, header)) as source:
        for start in range(0, header.size, len(buffer)):
            part = buffer[: header.size - start]
            source.read(start, part)
            digest.update(part.data)
        source.check()
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    with naming(path), path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
