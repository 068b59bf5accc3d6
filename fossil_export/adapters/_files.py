"""Which files of a folder hold an adapter's weights: one that PEFT writes, or several that an index lists.

PEFT itself writes and loads one file; axolotl (src/axolotl/train.py) and accelerate write several, with an index as
transformers has for models. torchtune (torchtune/training/checkpointing/_checkpointer.py) writes `adapter_0.pt` or
`adapter_model.pt` in its own names beside PEFT's file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters._beside import elsewhere
from fossil_export.adapters._pickled import read_pickled
from fossil_export.checkpoints._choice import by_name, check_index, indexed_files
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._jsonfile import json_in
from fossil_export.checkpoints._weights_file import is_pickle
from fossil_export.errors import AdapterError, CheckpointError, listed

if TYPE_CHECKING:
    import numpy as np

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT writes, in the order in which it looks for them."""

INDEXES = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json")
_OTHERS = re.compile(r"adapter_(model|\d+)\.(pt|pth|bin)")

_TORCHTUNE = re.compile(r"(.+\.)?layers\.\d+\.(attn|mlp)\..*\.(lora_[ab]\.weight|magnitude)")


@dataclass(frozen=True)
class Weights:
    """The weights files of an adapter: their `tensors`; the `headers` of what is read by ranges, or the arrays of what
    was `pickled` in another order; and all `files`, the index included."""

    tensors: tuple[TensorInfo, ...]
    files: tuple[Path, ...]
    headers: tuple[Header, ...] = ()
    pickled: Mapping[str, np.ndarray[Any, Any]] | None = None


def weights_name(home: Folder, more: tuple[str, ...] = ()) -> str | None:
    """The file in a folder that its weights are read from, or the index of several; None if there is none. Files
    called as in `more` are others that an adapter may have."""
    names = home.root_names()
    found = next((name for name in (*WEIGHTS, *INDEXES, *more) if name in names), None)
    others = [name for name in names if _OTHERS.fullmatch(name)]
    return found or (others[0] if len(others) == 1 else None)


def find_weights(folder: Path, home: Folder) -> Path:
    """The same as a path; raises AdapterError if there is none. `folder` is what `home` is called in messages."""
    if (name := weights_name(home)) is not None:
        return home.path / name
    remedy = elsewhere(str(folder), home) or "; copy the adapter's weights into it"
    raise AdapterError(f"{folder}: holds neither {' nor '.join(WEIGHTS)}{remedy}")


def files_of(name: str, home: Folder) -> list[str]:
    """The weights files that `name`, one of them or an index, stands for."""
    if not name.endswith(".json"):
        return [name]
    try:
        return indexed_files(home, home.path / name, _index(home, name))
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem


def read_weights(weights: Path, home: Folder) -> Weights:
    """What is in the file `weights` of `home`, or in those that it lists. Raises AdapterError."""
    names = files_of(weights.name, home)
    for index in (name for name in INDEXES if name in home.root_names() and name != weights.name):
        if len(parts := files_of(index, home)) > 1 and weights.name in parts:
            raise AdapterError(f"{weights}: is one of the {len(parts)} files of an adapter; name their folder instead")
    every = tuple(home.path / name for name in dict.fromkeys((weights.name, *names)))
    pickles = [name for name in names if is_pickle(name)]
    if pickles and len(pickles) < len(names):
        raise AdapterError(f"{weights}: lists {listed(pickles)} beside safetensors files; fetch the adapter again")
    try:
        home.check_links([path.name for path in every])
        if not pickles:
            headers = home.headers(names)
            pickled = None
        else:
            read = [read_pickled(home.path / name) for name in names]
            headers = tuple(one for one, _ in read)
            pickled = {name: array for _, arrays in read for name, array in arrays.items()}
        tensors = tuple(info for header in headers for info in header.tensors)
        if weights.name.endswith(".json"):
            check_index(weights, _index(home, weights.name)["weight_map"], by_name(headers))
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    if tuned := [info.name for info in tensors if _TORCHTUNE.fullmatch(info.name)]:
        raise AdapterError(
            f"{weights}: tensor {tuned[0]} is named as torchtune names its own, where the rows of heads have another "
            "order; name the folder with PEFT's adapter_model.safetensors, which its Hugging Face checkpointer writes"
        )
    return Weights(tensors, every, tuple(headers), pickled)


def _index(home: Folder, name: str) -> dict[str, Any]:
    return json_in(home, name, AdapterError)
