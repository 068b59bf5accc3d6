"""Adapter folders that PEFT writes, of every `peft_type` that a method knows.

Sources: peft/tuners/*/{config,layer}.py (peft/tuners/bone/ up to 0.18), and peft/utils/save_and_load.py for what else
lies in the file.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fossil_export._arguments import checked
from fossil_export.adapters import _mlx as mlx
from fossil_export.adapters._adapter import Adapter
from fossil_export.adapters._beside import elsewhere, only_one_in, refuse_lost
from fossil_export.adapters._fields import OTHERS
from fossil_export.adapters._files import WEIGHTS, files_of, find_weights, read_weights, weights_name
from fossil_export.adapters._keys import PREFIX, are_pefts, peft_keys
from fossil_export.adapters._parameters import take_parameters
from fossil_export.adapters._relatives import why_folder, why_tensor, why_type
from fossil_export.adapters._rwkv import is_state_dict, load_state_dict
from fossil_export.adapters._targets import Tails, check_targets
from fossil_export.adapters._trained import (
    by_module,
    empty,
    fields_of,
    formats,
    is_index,
    methods_of,
    refuse_mixtures,
    shared_of,
    split_key,
    trained_in,
)
from fossil_export.adapters._unmergeable import UNMERGEABLE
from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._dtypes import FLOATS, WHOLE
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.checkpoints._stamp import stamps_of
from fossil_export.errors import AdapterError, CheckpointError, listed
from fossil_export.storage import find_origin

CONFIG = "adapter_config.json"
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".json", ".npz")
# Of files that may be an adapter's, or lead to it.

# Fields that say how any adapter was trained or stored; none of them changes what the tensors mean.
_NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip

_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "task_type": (str,),
    "modules_to_save": (list,),
    "auto_mapping": (dict,),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
}


@checked
def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter: its config, and the headers of its files; values are read when they are asked for.

    The dimensions of the tensors decide the variant; what contradicts the config is refused.

    Args:
        path: A folder that PEFT or MLX saved, or another trainer in PEFT's form; the weights file in it; a state dict
            of RWKV-PEFT (.pth); or an id on the Hub ("user/repo", "user/repo@revision", "hf://user/repo/folder").

    Returns:
        Adapter: `trained` (by module: method, rank, tensors), `saved` (whole tensors), `rank`, `variant`, `parameters`,
            `base_model`, `notes` (lines to show); `arrays(module)` has values.

    Raises:
        AdapterError: It cannot be read, is damaged or contradicts itself, or is of a method that cannot be merged.
        HubError: The Hub refuses or cannot be reached.

    Example:
        >>> import fossil_export
        >>> adapter = fossil_export.load_adapter("my-adapter")  # doctest: +SKIP
        >>> adapter.rank, len(adapter.trained)  # doctest: +SKIP
        (64, 112)
    """
    if not isinstance(path, (str, os.PathLike)):
        raise AdapterError(
            f"{type(path).__name__}: is no path or id of an adapter; name one (merge and verify alone take several)"
        )
    found = find_origin(path, AdapterError, "adapter")
    if found.file is None and (inside := only_one_in(found.folder)) is not None:
        _refuse_link(found.folder, inside)
        found = found.within(inside, f"{found.name}: the adapter in its folder {inside} is taken, the only one in it")
    given, home = found.path, found.folder
    if found.is_path and found.file is not None and given.suffix not in _ENDINGS:
        raise AdapterError(f"{found.name}: is a file that holds no adapter; name the folder that the training saved")
    weights = given if given.is_file() and given.name != CONFIG else None
    if not found.is_path:
        root = home.root_names()
        file = found.file if found.file != CONFIG else None
        file = file or weights_name(home, (mlx.WEIGHTS,))
        if CONFIG not in root and not given.suffix == ".pth":
            raise AdapterError(f"{found.name}: not an adapter, {CONFIG} is missing{_hint(found.typed, home)}")
        if file is None:
            remedy = elsewhere(found.typed, home) or "; push the adapter's weights there"
            raise AdapterError(f"{found.name}: holds neither {' nor '.join(WEIGHTS)}{remedy}")
        weights = home.path / file
        at_once = [CONFIG] if CONFIG in root else []
        at_once += [name for name in {file, *files_of(file, home)} if not name.endswith(".safetensors")]
        home.fetch(at_once)
    with found.by_name():
        adapter = load_state_dict(given, home) if is_state_dict(given) else _load_folder(given, weights, home)
    return replace(adapter, name=found.name, revision=found.revision, notes=found.notes)


def _refuse_link(home: Folder, inside: str) -> None:
    """Raise AdapterError if the folder `inside` of `home` lies elsewhere: whoever made `home` chose what, not the
    user."""
    try:
        home.check_links([inside])
    except CheckpointError as problem:
        where = home.path / inside
        raise AdapterError(f"{where}: is a link out of its folder, to {where.resolve()}; name that one") from problem


def _load_folder(given: Path, weights: Path | None, home: Folder) -> Adapter:
    folder = home.path
    stamps = stamps_of([folder / CONFIG])
    written = _written_config(home)
    if mlx.is_mlx(written, home.root_names()):
        stamps |= stamps_of([weights] if weights is not None else [])
        return mlx.load_mlx(given, written, weights, home, stamps)
    config = _checked_config(folder / CONFIG, written)
    weights = weights or find_weights(folder, home)
    stamps |= stamps_of([weights, *(folder / name for name in files_of(weights.name, home))])
    refuse_lost(home, str(given))
    try:
        home.check_links([CONFIG])
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    read = read_weights(weights, home)

    methods = methods_of(config["peft_type"])
    endings = dict.fromkeys(ending for roles in methods.values() for ending in roles)
    places = {ending for roles in methods.values() for ending, role in roles.items() if role.startswith("#")}
    known = listed([f"….{ending}" for ending in endings], 8)
    common = shared_of(config["peft_type"])
    shared: dict[str, dict[str, TensorInfo]] = {name: {} for name in common}
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    saved: dict[str, TensorInfo] = {}
    below: dict[str, TensorInfo] = {}
    wholes = Tails(config.get("modules_to_save") or ())
    keys = peft_keys(weights, read.tensors, endings)
    for name, tensor in keys.items():
        if copy := _copy_of(name, keys):
            if copy[1] == "original_module":
                below[copy[0].removeprefix(PREFIX)] = tensor
            continue
        if users := [user for user, own in common.items() if name in own]:
            if tensor.dtype not in FLOATS or 0 in tensor.shape:
                raise AdapterError(f"{weights}: tensor {tensor.name} is no matrix of floats; save the adapter again")
            for user in users:
                shared[user][common[user][name]] = tensor
            continue
        if not name.startswith(PREFIX):
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is not named {PREFIX}…, so it is unknown which module it belongs to; "
                "save the adapter with PEFT's save_pretrained"
            )
        if why := why_tensor(name):
            raise AdapterError(f"{weights}: holds {tensor.name}: {why}")
        key = name.removeprefix(PREFIX)
        module, _, parameter = key.rpartition(".")
        whole = _in_whole(module, wholes)
        found = split_key(key, endings)
        allowed: tuple[str, ...] = (*FLOATS, *WHOLE) if found and found[1] in places else FLOATS
        if found and is_index(methods, found[1], tensor):
            allowed = ("I64", "I32")
        if tensor.dtype not in allowed and not whole:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(allowed)}; "
                "save the adapter again"
            )
        if found is not None:
            parts[found[0]][found[1]] = tensor
        elif whole or parameter in {"weight", "bias"}:
            own_name = f"{module.removesuffix('.base_layer').removesuffix('.token_adapter')}.{parameter}"
            if 0 in tensor.shape or not (tensor.shape or whole):
                raise AdapterError(empty(f"{weights}: saved tensor {tensor.name} {list(tensor.shape)}"))
            if other := saved.get(own_name):
                raise AdapterError(f"{weights}: holds {own_name} twice, as {other.name} and {tensor.name}; keep one")
            saved[own_name] = tensor
        else:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is neither a shard ({known}) nor a "
                "saved weight or bias; this adapter holds something fossil-export does not know how to merge"
            )
    if not parts:
        raise AdapterError(f"{weights}: holds no shards ({known}); was the adapter saved before training?")
    found_all = list(take_parameters(weights, folder / CONFIG, parts, config))
    found_all += [
        one for module, own in parts.items() for one in trained_in(weights, module, own, methods, config, shared)
    ]
    trained = by_module(found_all)
    if len(trained) < len(found_all):
        twice = next(one for one in found_all if trained[one.module] is not one)
        raise AdapterError(f"{weights}: trained {twice.module} in two ways ({twice.label}), of which one replaces it")
    refuse_mixtures(trained, weights)
    check_targets(folder / CONFIG, config, trained.values())
    return Adapter(
        path=given,
        peft_type=config["peft_type"],
        base_model=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        config=config,
        trained=trained,
        saved=saved,
        below=below,
        files=(folder / CONFIG, *read.files),
        pickled=read.pickled or {},
        home=home,
        headers=read.headers,
        stamps=stamps,
        is_pefts=are_pefts(keys),
    )


def _copy_of(name: str, names: Collection[str]) -> tuple[str, str] | None:
    """The tensor a name means, and the wrapper in it, if PEFT wrote it beside a saved embedding whose vocabulary was
    resized: `modules_to_save`, the same once more, or `original_module`, what lay below it before training."""
    for wrapper in ("modules_to_save", "original_module"):
        plain = name.replace(f".{wrapper}.", ".")
        if plain != name and plain in names:
            return plain, wrapper
    return None


def _in_whole(module: str, wholes: Tails) -> bool:
    """Whether a module lies in one of modules_to_save, all of whose parameters and buffers are saved."""
    return any(wholes.hold(module[: at.start()]) for at in re.finditer(r"\.|$", module))


def _written_config(home: Folder) -> dict[str, Any]:
    path = home.path / CONFIG
    if os.path.lexists(path) and not path.is_file():
        raise AdapterError(f"{path}: is a broken link or no regular file; put the file itself in its place")
    if not path.is_file():
        raise AdapterError(f"{home.path}: not an adapter, {CONFIG} is missing{_hint(str(home.path), home)}")
    return read_json(path, AdapterError)


def _checked_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    peft_type = config.get("peft_type")
    if why := why_type(peft_type) or UNMERGEABLE.get(str(peft_type)):
        raise AdapterError(f"{path}: peft_type is {peft_type!r}: {why}")
    known = [name for name in formats() if name != mlx.PEFT_TYPE]
    if not isinstance(peft_type, str) or peft_type not in known:
        raise AdapterError(
            f"{path}: peft_type is {peft_type!r}, not one that fossil-export knows ({', '.join(known)}); "
            "merge it with the tool of that method"
        )
    fields = {**OTHERS, **fields_of(peft_type)}
    for name, field in fields.items():
        value = config.get(name, field.default)
        if not field.holds(value):
            raise AdapterError(f"{path}: {name} is {value!r}, {field.why or f'expected {field.expected}'}")
    for name, kinds in _TYPES.items():
        value = config.get(name)
        member = int if name == "layers_to_transform" else str
        odd = isinstance(value, list) and not all(isinstance(one, member) for one in value)
        if value is not None and (odd or not isinstance(value, kinds)):
            raise AdapterError(f"{path}: {name} is {value!r}, which PEFT never writes; mend or save it again")
    understood = _NEUTRAL_FIELDS | fields.keys()
    unknown = [
        name for name, value in config.items() if name not in understood and value not in (None, False, [], {}, "")
    ]
    if unknown:
        raise AdapterError(
            f"{path}: sets {listed(unknown)}, which fossil-export does not understand; "
            "the merge could be wrong, so it stops here (a newer version may know it)"
        )
    return config


def _hint(where: str, home: Folder) -> str:
    """What a folder with these files may be instead of an adapter."""
    root = home.root_names()
    if found := why_folder(root) or elsewhere(where, home):
        return found
    if PROVENANCE in root:
        return "; it is a result of fossil-export, and the adapter is the folder that the training saved"
    if "config.json" in root:
        return "; it looks like a model, and the adapter is the folder that PEFT saved"
    return "; name the folder that the training saved"
