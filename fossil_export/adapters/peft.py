"""Adapter folders that PEFT writes: `MISS` (PEFT 0.16 on) and `BONE` (PEFT 0.14 to 0.18).

Sources: peft/tuners/miss/{config,layer}.py, peft/tuners/bone/ up to 0.18, and
peft/utils/save_and_load.py for what else lies in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fossil_export.adapters.adapter import Adapter, Shard
from fossil_export.adapters.pickled import read_pickled
from fossil_export.adapters.rwkv import is_state_dict, load_state_dict
from fossil_export.checkpoints.dtypes import FLOATS
from fossil_export.checkpoints.folder import Folder
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.checkpoints.jsonfile import read_json
from fossil_export.checkpoints.stamp import stamps_of
from fossil_export.errors import AdapterError, CheckpointError, listed
from fossil_export.storage import find_origin

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
SHARD_KEYS = {"MISS": "miss_block", "BONE": "bone_block"}

# Fields that say how the adapter was trained or stored; none of them changes what the tensors mean.
_NEUTRAL_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "init_weights", "layers_pattern", "layers_to_transform", "mini_r", "miss_dropout", "modules_to_save",
    "peft_type", "peft_version", "r", "revision", "target_modules", "task_type",
}  # fmt: skip


_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "task_type": (str,),
    "modules_to_save": (list,),
    "target_modules": (list, str),
}


def load_adapter(path: str | Path) -> Adapter:
    """Read a FOSSIL adapter: a folder that PEFT saved, the weights file in it, or a state dict of RWKV-PEFT (.pth).

    `path` may also be an id on the Hub, `user/repo[@revision]` or `hf://…`. Only headers and the config are read; who
    runs something fetches what `Adapter.needed` names. The dimensions of the tensors decide the variant (2-D tile or
    mini, 3-D bat); the config must agree. Raises AdapterError for anything that is damaged, contradictory or not
    understood: nothing the adapter holds is ever left out silently. HubError says what the Hub refuses.
    """
    found = find_origin(path, AdapterError, "adapter")
    given, source = found.path, found.folder
    weights = given if given.is_file() and given.name != CONFIG else None
    if not found.is_path:
        root = source.root_names()
        file = found.file if found.file != CONFIG else None
        file = file or next((name for name in WEIGHTS if name in root), None)
        if CONFIG not in root and not given.suffix == ".pth":
            raise AdapterError(f"{found.name}: not an adapter, {CONFIG} is missing{_hint(root)}")
        if file is None:
            raise AdapterError(f"{found.name}: holds neither {' nor '.join(WEIGHTS)}; push the adapter's weights there")
        weights = source.path / file
        at_once = [CONFIG] if CONFIG in root else []
        source.fetch(at_once if weights.suffix == ".safetensors" else [*at_once, file])
    with found.by_name():
        adapter = load_state_dict(given, source) if is_state_dict(given) else _load_folder(given, weights, source)
    return replace(adapter, name=found.name, revision=found.revision, notes=found.notes)


def _load_folder(given: Path, weights: Path | None, source: Folder) -> Adapter:
    folder = source.path
    stamps = stamps_of([folder / CONFIG])
    config = _read_config(folder)
    weights = weights or find_weights(folder)
    stamps |= stamps_of([weights])
    header = None
    try:
        source.check_links([CONFIG, weights.name])
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    if weights.suffix == ".safetensors":
        try:
            (header,) = source.headers([weights.name])
        except CheckpointError as problem:
            raise AdapterError(str(problem)) from problem
        tensors = header.tensors
        pickled: Mapping[str, Any] = {}
    else:
        tensors, pickled = read_pickled(weights)

    peft_type = config["peft_type"]
    shards: dict[str, Shard] = {}
    saved: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if not tensor.name.startswith(PREFIX):
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is not named {PREFIX}…, so it is unknown which module it belongs to; "
                "save the adapter with PEFT's save_pretrained"
            )
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            )
        module, _, parameter = tensor.name.removeprefix(PREFIX).rpartition(".")
        if parameter == SHARD_KEYS[peft_type]:
            shards[module] = _shard(weights, module, tensor, config)
        elif parameter in {"weight", "bias"}:
            name = f"{module.removesuffix('.base_layer')}.{parameter}"
            if 0 in tensor.shape or not tensor.shape:
                raise AdapterError(_empty(f"{weights}: saved tensor {tensor.name} {list(tensor.shape)}"))
            if name in saved:
                raise AdapterError(f"{weights}: holds {name} twice, as {saved[name].name} and {tensor.name}; keep one")
            saved[name] = tensor
        else:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is neither a shard (….{SHARD_KEYS[peft_type]}) nor a "
                "saved weight or bias; this adapter holds something fossil-export does not know how to merge"
            )
    if not shards:
        raise AdapterError(
            f"{weights}: holds no shards (….{SHARD_KEYS[peft_type]}); was the adapter saved before training?"
        )
    variants = {shard.variant for shard in shards.values()}
    if len(variants) > 1:
        raise AdapterError(f"{weights}: mixes {' and '.join(sorted(variants))} shards; one adapter has one variant")
    _check_targets(folder / CONFIG, config, shards)
    return Adapter(
        path=given,
        peft_type=peft_type,
        variant=variants.pop(),
        rank=config["r"],
        base_model=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        config=config,
        shards=shards,
        saved=saved,
        files=(folder / CONFIG, weights),
        pickled=pickled,
        source=source,
        header=header,
        stamps=stamps,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        names = [name for name in ("config.json",) if (folder / name).is_file()]
        raise AdapterError(f"{folder}: not an adapter, {CONFIG} is missing{_hint(names)}")
    config = read_json(path, AdapterError)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in SHARD_KEYS:
        raise AdapterError(
            f"{path}: peft_type is {peft_type!r}, not a FOSSIL adapter (MISS or BONE); "
            "merge it with the tool of that method"
        )
    rank, mini_r = config.get("r"), config.get("mini_r", 1)
    for name, value in (("r", rank), ("mini_r", mini_r)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(f"{path}: {name} is {value!r}, expected a positive integer")
    if config.get("init_weights", True) not in (True, False, "bat", "mini"):
        raise AdapterError(f"{path}: init_weights is {config['init_weights']!r}, expected true, false, 'bat' or 'mini'")
    for name, kinds in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kinds):
            raise AdapterError(f"{path}: {name} is {value!r}, which PEFT never writes; mend or save it again")
    unknown = [
        name for name, value in config.items() if name not in _NEUTRAL_FIELDS and value not in (None, False, [], {}, "")
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


def _shard(weights: Path, module: str, tensor: TensorInfo, config: Mapping[str, Any]) -> Shard:
    """Decide the variant from the tensor's dimensions and hold it against the config."""
    init, rank, mini_r = config.get("init_weights", True), config["r"], config.get("mini_r", 1)
    where = f"{weights}: shard {tensor.name} {list(tensor.shape)}"
    if 0 in tensor.shape:
        raise AdapterError(_empty(where))
    if len(tensor.shape) == 3:
        # PEFT 0.14.0.dev stored bat shards under "init_weights": true; MISS never did.
        if init != "bat" and not (config["peft_type"] == "BONE" and init is True):
            raise AdapterError(
                f"{where} is 3-dimensional, a bat shard, but the config says init_weights={init!r}; mend the config"
            )
        if tensor.shape[1] != tensor.shape[2]:
            raise AdapterError(f"{where} should be (out/r, r, r), but its last two sizes differ")
        found, variant = tensor.shape[1], "bat"
    elif len(tensor.shape) == 2:
        if init == "bat":
            raise AdapterError(
                f"{where} is 2-dimensional, a tile shard, but the config says init_weights='bat'; mend the config"
            )
        found, variant = tensor.shape[0], "mini" if init == "mini" else "tile"
        if variant == "mini" and tensor.shape[1] != mini_r:
            raise AdapterError(f"{where} has mini_r {tensor.shape[1]}, but the config says mini_r={mini_r}")
    else:
        raise AdapterError(f"{where} has {len(tensor.shape)} dimensions, expected 2 (tile, mini) or 3 (bat)")
    if found != rank:
        raise AdapterError(f"{where} has rank {found}, but the config says r={rank}")
    return Shard(module, variant, rank, tensor)


def _empty(where: str) -> str:
    return f"{where} is empty; it was saved without being gathered (DeepSpeed ZeRO-3 or FSDP), save it again"


def _check_targets(path: Path, config: Mapping[str, Any], shards: Mapping[str, Shard]) -> None:
    """Every shard must belong to a module that the config targets.

    Source: check_target_module_exists in peft/tuners/tuners_utils.py.
    """
    targets = config.get("target_modules")
    if isinstance(targets, list):
        strays = [
            name for name in shards if not any(name == target or name.endswith(f".{target}") for target in targets)
        ]
    elif isinstance(targets, str) and targets != "all-linear":
        try:
            pattern = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as problem:
            raise AdapterError(f"{path}: target_modules is not a valid regular expression: {problem}") from problem
        strays = [name for name in shards if not pattern.fullmatch(name)]
    else:
        return
    if strays:
        raise AdapterError(
            f"{path}: target_modules does not cover {listed(strays)}, for which there are shards; "
            "the files do not belong together"
        )
