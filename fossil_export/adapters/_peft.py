"""Adapter folders that PEFT writes, of every `peft_type` that a method knows.

Sources: peft/tuners/*/{config,layer}.py (peft/tuners/bone/ up to 0.18), and peft/utils/save_and_load.py for what else
lies in the file.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fossil_export.adapters._adapter import Adapter
from fossil_export.adapters._pickled import read_pickled
from fossil_export.adapters._rwkv import is_state_dict, load_state_dict
from fossil_export.adapters._trained import (
    Trained,
    by_module,
    empty,
    fields_of,
    formats,
    methods_of,
    refuse_mixtures,
    shared_of,
    split_key,
    trained_in,
)
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.checkpoints._stamp import stamps_of
from fossil_export.errors import AdapterError, CheckpointError, listed
from fossil_export.storage import find_origin

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

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
}


def load_adapter(path: str | Path) -> Adapter:
    """Read a FOSSIL adapter: a folder that PEFT saved, the weights file in it, or a state dict of RWKV-PEFT (.pth).

    `path` may also be an id on the Hub, `user/repo[@revision]` or `hf://…`. Only headers and the config are read; who
    runs something fetches what `Adapter.needed` names. The dimensions of the tensors decide the variant (2-D tile or
    mini, 3-D bat); the config must agree. Raises AdapterError for anything that is damaged, contradictory or not
    understood: nothing the adapter holds is ever left out silently. HubError says what the Hub refuses.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise AdapterError(
            f"{type(path).__name__}: is no path or id of an adapter; name one (merge and verify alone take several)"
        )
    found = find_origin(path, AdapterError, "adapter")
    given, home = found.path, found.folder
    weights = given if given.is_file() and given.name != CONFIG else None
    if not found.is_path:
        root = home.root_names()
        file = found.file if found.file != CONFIG else None
        file = file or next((name for name in WEIGHTS if name in root), None)
        if CONFIG not in root and not given.suffix == ".pth":
            raise AdapterError(f"{found.name}: not an adapter, {CONFIG} is missing{_hint(root)}")
        if file is None:
            raise AdapterError(f"{found.name}: holds neither {' nor '.join(WEIGHTS)}; push the adapter's weights there")
        weights = home.path / file
        at_once = [CONFIG] if CONFIG in root else []
        home.fetch(at_once if weights.suffix == ".safetensors" else [*at_once, file])
    with found.by_name():
        adapter = load_state_dict(given, home) if is_state_dict(given) else _load_folder(given, weights, home)
    return replace(adapter, name=found.name, revision=found.revision, notes=found.notes)


def _load_folder(given: Path, weights: Path | None, home: Folder) -> Adapter:
    folder = home.path
    stamps = stamps_of([folder / CONFIG])
    config = _read_config(folder)
    weights = weights or find_weights(folder)
    stamps |= stamps_of([weights])
    header = None
    try:
        home.check_links([CONFIG, weights.name])
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    if weights.suffix == ".safetensors":
        try:
            (header,) = home.headers([weights.name])
        except CheckpointError as problem:
            raise AdapterError(str(problem)) from problem
        tensors = header.tensors
        pickled: Mapping[str, Any] = {}
    else:
        tensors, pickled = read_pickled(weights)

    methods = methods_of(config["peft_type"])
    endings = dict.fromkeys(ending for roles in methods.values() for ending in roles)
    known = ", ".join(f"….{ending}" for ending in endings)
    common = shared_of(config["peft_type"])
    shared: dict[str, dict[str, TensorInfo]] = {name: {} for name in common}
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    saved: dict[str, TensorInfo] = {}
    below: dict[str, TensorInfo] = {}
    given_names = {tensor.name for tensor in tensors}
    for tensor in tensors:
        if copy := _copy_of(tensor.name, given_names):
            if copy[1] == "original_module":
                below[copy[0].removeprefix(PREFIX)] = tensor
            continue
        if users := [name for name, keys in common.items() if tensor.name in keys]:
            for name in users:
                shared[name][common[name][tensor.name]] = tensor
            continue
        if not tensor.name.startswith(PREFIX):
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is not named {PREFIX}…, so it is unknown which module it belongs to; "
                "save the adapter with PEFT's save_pretrained"
            )
        key = tensor.name.removeprefix(PREFIX)
        module, _, parameter = key.rpartition(".")
        whole = _in_whole(module, config)
        if tensor.dtype not in FLOATS and not whole:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            )
        if found := split_key(key, endings):
            parts[found[0]][found[1]] = tensor
        elif whole or parameter in {"weight", "bias"}:
            name = f"{module.removesuffix('.base_layer')}.{parameter}"
            if 0 in tensor.shape or not (tensor.shape or whole):
                raise AdapterError(empty(f"{weights}: saved tensor {tensor.name} {list(tensor.shape)}"))
            if name in saved:
                raise AdapterError(f"{weights}: holds {name} twice, as {saved[name].name} and {tensor.name}; keep one")
            saved[name] = tensor
        else:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is neither a shard ({known}) nor a "
                "saved weight or bias; this adapter holds something fossil-export does not know how to merge"
            )
    if not parts:
        raise AdapterError(f"{weights}: holds no shards ({known}); was the adapter saved before training?")
    trained = by_module(
        one for module, own in parts.items() for one in trained_in(weights, module, own, methods, config, shared)
    )
    refuse_mixtures(trained, weights)
    _check_targets(folder / CONFIG, config, trained)
    return Adapter(
        path=given,
        peft_type=config["peft_type"],
        base_model=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        config=config,
        trained=trained,
        saved=saved,
        below=below,
        files=(folder / CONFIG, weights),
        pickled=pickled,
        home=home,
        header=header,
        stamps=stamps,
    )


def _copy_of(name: str, names: Collection[str]) -> tuple[str, str] | None:
    """The tensor a name means, and the wrapper in it, if PEFT wrote it beside a saved embedding whose vocabulary was
    resized: `modules_to_save`, the same once more, or `original_module`, what lay below it before training."""
    for wrapper in ("modules_to_save", "original_module"):
        plain = name.replace(f".{wrapper}.", ".")
        if plain != name and plain in names:
            return plain, wrapper
    return None


def _in_whole(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module lies in one of modules_to_save, all of whose parameters and buffers are saved."""
    names = config.get("modules_to_save")
    parents = [module[: at.start()] for at in re.finditer(r"\.|$", module)]
    return isinstance(names, list) and any(
        isinstance(name, str) and any(parent.endswith(name) for parent in parents) for name in names
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        names = [name for name in ("config.json",) if (folder / name).is_file()]
        raise AdapterError(f"{folder}: not an adapter, {CONFIG} is missing{_hint(names)}")
    config = read_json(path, AdapterError)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in formats():
        raise AdapterError(
            f"{path}: peft_type is {peft_type!r}, not one that fossil-export knows ({', '.join(formats())}); "
            "merge it with the tool of that method"
        )
    fields = fields_of(peft_type)
    for name, field in fields.items():
        value = config.get(name, field.default)
        if not field.holds(value):
            raise AdapterError(f"{path}: {name} is {value!r}, {field.why or f'expected {field.expected}'}")
    for name, kinds in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kinds):
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


def _hint(names: Sequence[str]) -> str:
    """What a folder with these files may be instead of an adapter."""
    if "config.json" in names:
        return "; it looks like a model, and the adapter is the folder that PEFT saved"
    return ""


def find_weights(folder: Path) -> Path:
    """The weights file PEFT takes from an adapter's `folder`; raises AdapterError when there is none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise AdapterError(f"{folder}: holds neither {' nor '.join(WEIGHTS)}; copy the adapter's weights into it")


def _check_targets(path: Path, config: Mapping[str, Any], trained: Mapping[str, Trained]) -> None:
    """Every trained module must be one that the config targets.

    Source: check_target_module_exists in peft/tuners/tuners_utils.py.
    """
    targets = config.get("target_modules")
    owners = dict.fromkeys(one.owner for one in trained.values())
    if isinstance(targets, list):
        strays = [
            name for name in owners if not any(name == target or name.endswith(f".{target}") for target in targets)
        ]
    elif isinstance(targets, str) and targets != "all-linear":
        try:
            pattern = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as problem:
            raise AdapterError(f"{path}: target_modules is not a valid regular expression: {problem}") from problem
        strays = [name for name in owners if not pattern.fullmatch(name)]
    else:
        return
    if strays:
        raise AdapterError(
            f"{path}: target_modules does not cover {listed(strays)}, for which there are shards; "
            "the files do not belong together"
        )
