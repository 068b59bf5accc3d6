"""A base model on disk: its safetensors files, index and config, opened read-only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fossil_export.checkpoints.header import Header, TensorInfo, read_header
from fossil_export.checkpoints.jsonfile import read_json
from fossil_export.errors import CheckpointError, listed

WEIGHTS = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model and the folder they lie in.

    `folder` is None for a lone weights file, which has no companions (config, tokenizer). `index_path` is
    None when one file holds everything.
    """

    folder: Path | None
    files: tuple[Header, ...]
    index_path: Path | None
    index: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo]

    @property
    def location(self) -> Path:
        return self.folder if self.folder is not None else self.files[0].path

    @property
    def nbytes(self) -> int:
        """Size of all weights files together, headers included."""
        return sum(header.size for header in self.files)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder, or one safetensors file of it, without reading any weights.

    In a folder `model.safetensors` wins over its index, as in transformers, and that over the only other
    index or safetensors file. Raises CheckpointError when there are no weights, several sets of them, or damage.
    """
    if path.is_dir():
        folder: Path | None = path
        index_path, weights = _choose(path)
    elif path.is_file():
        folder = path.parent if (path.parent / "config.json").is_file() else None
        if path.name.endswith(INDEX_ENDING):
            folder, index_path, weights = path.parent, path, None
        elif path.suffix == ".safetensors":
            _refuse_part(path)
            index_path, weights = None, path
        else:
            raise CheckpointError(f"{path}: not a safetensors file; {_RESAVE}")
    else:
        raise CheckpointError(f"{path}: no such file or folder; name the base model with --base")

    index = None
    if index_path is not None:
        index = read_json(index_path, CheckpointError)
        files = tuple(read_header(file) for file in _indexed_files(index_path, index))
    else:
        assert weights is not None
        files = (read_header(weights),)
    tensors = _by_name(files)
    if index is not None and index_path is not None:
        _check_index(index_path, index["weight_map"], tensors)
    config = None
    if folder is not None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json", CheckpointError)
        _check_config(folder / "config.json", config)
    return Checkpoint(folder, files, index_path, index, config, tensors)


_RESAVE = (
    "load the model with transformers and save it with save_pretrained(..., safe_serialization=True), "
    "then name that folder"
)


def _refuse_part(path: Path) -> None:
    """A file that an index beside it lists with others is not a model."""
    for index_path in path.parent.glob(f"*{INDEX_ENDING}"):
        weight_map = read_json(index_path, CheckpointError).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if path.name in files and len(files) > 1:
            raise CheckpointError(f"{path}: is one of the {len(files)} files of a model; name their folder instead")


def _choose(folder: Path) -> tuple[Path | None, Path | None]:
    """The index or else the one weights file of `folder`."""
    default = folder / f"model{INDEX_ENDING}"
    if (folder / WEIGHTS).is_file():
        return None, folder / WEIGHTS
    if default.is_file():
        return default, None
    indexes = sorted(folder.glob(f"*{INDEX_ENDING}"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indexes) == 1:
        return indexes[0], None
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder}: holds several sets of weights ({listed([file.name for file in indexes])}); name one of these"
        )
    if len(files) == 1:
        return None, files[0]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} safetensors files but no index of them; fetch the model's {default.name}, "
            "or name the one file to merge into"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: is an adapter, not a base model; name the base model with --base")
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in {".bin", ".pt", ".pth"}]
    if pickled:
        raise CheckpointError(f"{folder}: has weights only as {listed(pickled)}; {_RESAVE}")
    raise CheckpointError(f"{folder}: holds no safetensors weights; {_RESAVE}")


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The fields that are looked at have the types that transformers gives them."""
    for name, kind in (("text_config", dict), ("architectures", list), ("id2label", dict)):
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, not a {kind.__name__}; fetch it again")


def _indexed_files(index_path: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files an index names, in the order of their names, each checked to lie in its folder."""
    weight_map = index.get("weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(f"{index_path}: its metadata is no JSON object; fetch it again")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: has no weight_map of tensor to file; fetch it again")
    if not weight_map:
        raise CheckpointError(f"{index_path}: its weight_map is empty; fetch it again")
    paths = []
    for name in sorted(set(weight_map.values())):
        parts = PurePosixPath(name).parts
        if len(parts) != 1 or name != parts[0] or parts[0] in {"..", "/"} or "\\" in name:
            raise CheckpointError(f"{index_path}: names {name!r}, which is no file in its own folder; fetch it again")
        path = index_path.parent / name
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names {name}, which is missing; fetch that file")
        paths.append(path)
    return paths


def _by_name(files: tuple[Header, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in files:
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{header.path}: tensor {tensor.name} stands also in {tensors[tensor.name].path.name}; "
                    "the files do not belong to one model, fetch them again"
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError(f"{files[0].path}: holds no tensors; fetch it again")
    return tensors


def _check_index(index_path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index_path}: says that {name} is in {file}, which lacks it; fetch both again")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{index_path}: does not list {listed(unlisted)}, found in its files; fetch it again")


def identity(checkpoint: Checkpoint, full: bool = False) -> list[dict[str, Any]]:
    """What tells this base from another, without reading its weights a second time.

    Per weights file: name, size, SHA-256 of its header and, in a Hub cache, the blob's id (for large files
    the SHA-256 of the whole). `full` adds the SHA-256 of each whole file, at the cost of reading it.
    """
    records = []
    for header in checkpoint.files:
        with header.path.open("rb") as file:
            record: dict[str, Any] = {
                "file": header.path.name,
                "size": header.size,
                "header_sha256": hashlib.sha256(file.read(header.length)).hexdigest(),
            }
        if blob := _hub_blob(header.path):
            record["hub_blob"] = blob
        if full:
            record["sha256"] = sha256(header.path)
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


def _hub_blob(path: Path) -> str | None:
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" else None
