"""A base model: its safetensors files, index and config, opened read-only, here or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._choice import (
    INDEX_ENDING,
    PICKLED_INDEX_ENDING,
    RESAVE,
    by_name,
    check_index,
    choose,
    indexed_files,
    json_of,
    refuse_part,
    renamed,
)
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import stored_dtype
from fossil_export.checkpoints._folder import Folder, LocalFolder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._weights_file import is_pickle
from fossil_export.checkpoints.layouts import find_matrix
from fossil_export.checkpoints.quantized import FORMATS, Stored, settings_of
from fossil_export.errors import CheckpointError


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
    (config, tokenizer). `index_path` is None when one file holds everything. `found` keeps what others work out of it.

    Of a model whose weights are `quantized`, tensors and config are those of the dequantized model.
    """

    home: Folder
    folder: Path | None
    files: tuple[Header, ...]
    index_path: Path | None
    index: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    quantized: Quantized | None = None
    found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.location}: {len(self.tensors)} tensors, {self.nbytes:,} bytes>"

    @property
    def location(self) -> Path:
        return self.folder if self.folder is not None else self.files[0].path

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


def open_checkpoint(where: Path | Folder, file: str | None = None) -> Checkpoint:
    """Open a model folder, or one weights file or index of it, without reading any weights.

    `where` is a path, or a folder elsewhere, of which `file` names the one to open. In a folder
    `model.safetensors` wins over its index, as in transformers, then come `pytorch_model.bin` and its index, and then
    the only other index or file, safetensors before files of PyTorch's. Raises CheckpointError when there are no
    weights, several sets of them, or damage.
    """
    if isinstance(where, Path):
        if not where.is_dir() and not where.is_file():
            raise CheckpointError(f"{where}: no such file or folder; name the base model with --base")
        home: Folder = LocalFolder(where if where.is_dir() else where.parent)
        file = None if where.is_dir() else where.name
    else:
        home = where
    root = home.root_names()
    folder = home.path if file is None or "config.json" in root else None
    if file is None:
        index_name, weights = choose(home)
    elif file.endswith((INDEX_ENDING, PICKLED_INDEX_ENDING)):
        folder, index_name, weights = home.path, file, None
    elif file.endswith(".safetensors") or is_pickle(file):
        refuse_part(home, file)
        index_name, weights = None, file
    else:
        raise CheckpointError(f"{home.path / file}: not a weights file; {RESAVE}")

    index = index_path = None
    if index_name is not None:
        index_path = home.path / index_name
        index = json_of(home, index_name)
        files = home.headers(indexed_files(home, index_path, index))
    else:
        assert weights is not None
        files = home.headers([weights])
    files = renamed(files)
    tensors = by_name(files)
    if index is not None and index_path is not None:
        check_index(index_path, index["weight_map"], tensors)
    config = None
    if folder is not None and "config.json" in root:
        config = json_of(home, "config.json")
        _check_config(folder / "config.json", config)
    return dequantized(Checkpoint(home, folder, files, index_path, index, config, tensors))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantized weights as floats under their plain names; itself if it has none that are
    known. Raises CheckpointError if its quantization is damaged, or contradicts the config."""
    settings = settings_of(checkpoint.config)
    where = str(checkpoint.location)
    stored = Stored(where, checkpoint.tensors, checkpoint.config or {}, settings, partial(view_rows, checkpoint.home))
    name = next((name for name, one in FORMATS.items() if one.describes(stored)), None)
    if name is None:
        return checkpoint
    coded = list(FORMATS[name].read(stored))
    by_first = {one.coding.stored[0].name: one for one in coded if one.coding is not None}
    taken = {info.name for one in coded if one.coding is not None for info in one.coding.stored}
    for one in coded:
        if one.name in checkpoint.tensors and one.name not in taken:
            raise CheckpointError(f"{where}: has {one.name} twice, quantized and as it is; fetch it again")

    def shown(info: TensorInfo) -> list[TensorInfo]:
        if info.name in by_first:
            return [by_first[info.name]]
        return [] if info.name in taken or FORMATS[name].passes_over(info, stored) else [info]

    files = tuple(
        replace(header, tensors=tuple(one for info in header.tensors for one in shown(info)), derived=True)
        for header in checkpoint.files
    )
    return replace(
        checkpoint,
        files=files,
        config=None if checkpoint.config is None else FORMATS[name].plain_config(checkpoint.config),
        tensors=by_name(files),
        quantized=Quantized(name, settings or {}, checkpoint),
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The fields that are looked at have the types that transformers gives them."""
    for name, kind in (("text_config", dict), ("architectures", list), ("id2label", dict)):
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, not a {kind.__name__}; fetch it again")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        # Loaders do not agree on what 1 or "true" is.
        if not isinstance(tie := part.get("tie_word_embeddings", False), (bool, type(None))):
            raise CheckpointError(f"{path}: tie_word_embeddings is {tie!r}, not true or false; mend it")


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
        if full:
            known = blob is not None and len(blob) == 64 and not header.path.is_file()
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


def sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
