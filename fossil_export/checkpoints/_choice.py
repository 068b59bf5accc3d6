"""Which files of a folder are a model's weights: one, or several that an index lists, and are all of them there?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._jsonfile import json_in
from fossil_export.checkpoints._weights_file import is_pickle
from fossil_export.checkpoints.gguf import ENDING as GGUF
from fossil_export.errors import CheckpointError, listed

WEIGHTS = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX_ENDING = ".bin.index.json"
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
_NO_WEIGHTS = re.compile(
    r"adapter_model|adapter_\d|training_args|optimizer|scheduler|scaler|rng_state|trainer|random_states|v(alue)?_head"
)
"""How files of PyTorch's begin that lie beside a model and are not it."""


RESAVE = (
    "load the model with transformers and save it with save_pretrained(..., safe_serialization=True), "
    "then name that folder"
)


def choose(home: Folder) -> tuple[str | None, str | None]:
    """The index or else the one weights file of a folder."""
    folder, names = home.path, home.root_names()
    default = f"model{INDEX_ENDING}"
    if WEIGHTS in names:
        return None, WEIGHTS
    if default in names:
        return default, None
    is_adapter = "adapter_config.json" in names
    # Parts without their index are damage, which older weights beside them must not hide.
    parts = any(_PART.fullmatch(name) for name in names)
    if not parts and (not is_adapter or "config.json" in names):  # an adapter's pytorch_model.bin is a value head
        if PICKLED in names:
            return None, PICKLED
        if (pickled_index := f"pytorch_model{PICKLED_INDEX_ENDING}") in names:
            return pickled_index, None
    indexes = [name for name in names if name.endswith(INDEX_ENDING)]
    files = [name for name in names if name.endswith(".safetensors")]
    if len(indexes) == 1:
        return indexes[0], None
    if len(indexes) > 1:
        raise CheckpointError(f"{folder}: holds several sets of weights ({listed(indexes)}); name one of these")
    if len(files) == 1:
        return None, files[0]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} safetensors files but no index of them; fetch the model's {default}, "
            "or name the one file to merge into"
        )
    if is_adapter:
        raise CheckpointError(f"{folder}: is an adapter, not a base model; name the base model with --base")
    pickled = [name for name in names if is_pickle(name) and not _NO_WEIGHTS.match(name)]
    indexes = [name for name in names if name.endswith(PICKLED_INDEX_ENDING)]
    if len(indexes) == 1:
        return indexes[0], None
    if len(pickled) == 1:
        return None, pickled[0]
    if pickled:
        raise CheckpointError(
            f"{folder}: has weights only as {listed(pickled)} and no index of them; name the one file to merge into, "
            f"or {RESAVE}"
        )
    packed = [name for name in names if name.endswith(GGUF)]
    if len(packed) == 1:
        return None, packed[0]
    if packed:
        raise CheckpointError(f"{folder}: holds several GGUF files ({listed(packed)}); name one of these")
    raise CheckpointError(f"{folder}: holds no safetensors weights; {RESAVE}")


def refuse_part(home: Folder, file: str) -> None:
    """A file that an index beside it lists with others is not a model."""
    for name in home.root_names():
        if not name.endswith((INDEX_ENDING, PICKLED_INDEX_ENDING)):
            continue
        weight_map = json_of(home, name).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if file in files and len(files) > 1:
            raise CheckpointError(
                f"{home.path / file}: is one of the {len(files)} files of a model; name their folder instead"
            )


def renamed(files: tuple[Header, ...]) -> tuple[Header, ...]:
    """The same files; those of PyTorch's with the names that merged ones have in their place."""
    if not any(is_pickle(header.path.name) for header in files):
        return files
    count = len(files)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(
        replace(header, written_as=name) for header, name in zip(files, names if count > 1 else [WEIGHTS], strict=True)
    )


def indexed_files(home: Folder, index_path: Path, index: Mapping[str, Any]) -> list[str]:
    """The files an index names, in the order of their names, each checked to lie in its folder."""
    weight_map = index.get("weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(f"{index_path}: its metadata is no JSON object; fetch it again")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: has no weight_map of tensor to file; fetch it again")
    if not weight_map:
        raise CheckpointError(f"{index_path}: its weight_map is empty; fetch it again")
    found, root = [], set(home.root_names())
    for name in sorted(set(weight_map.values())):
        parts = PurePosixPath(name).parts
        if len(parts) != 1 or name != parts[0] or parts[0] in {"..", "/"} or "\\" in name:
            raise CheckpointError(f"{index_path}: names {name!r}, which is no file in its own folder; fetch it again")
        if name not in root:
            raise CheckpointError(f"{index_path}: names {name}, which is missing; fetch that file")
        found.append(name)
    return found


def by_name(files: tuple[Header, ...]) -> dict[str, TensorInfo]:
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


def check_index(index_path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index_path}: says that {name} is in {file}, which lacks it; fetch both again")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{index_path}: does not list {listed(unlisted)}, found in its files; fetch it again")


def json_of(home: Folder, name: str) -> dict[str, Any]:
    return json_in(home, name, CheckpointError)
