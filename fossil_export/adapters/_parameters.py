"""Which parameter each LoRA of `target_parameters` is of.

PEFT wraps a module once for each of its parameters that is targeted, in the order in which the module has them; the
first is innermost, and each layer around it takes a `.base_layer` out of the keys. The keys have no parameter's name.
Source: `_inject_parameters` in peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fossil_export.adapters._targets import is_targeted
from fossil_export.adapters._trained import Trained
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import AdapterError, listed
from fossil_export.methods import METHODS

ORDER = (
    "gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias",
    "w1", "v1", "w2",
)  # fmt: skip
"""How experts in transformers have their parameters."""

_INNER = ".base_layer"
_ROLES = {"lora_A.weight": "A", "lora_B.weight": "B"}

Parts = dict[str, dict[str, TensorInfo]]


def take_parameters(file: Path, config_file: Path, parts: Parts, config: Mapping[str, Any]) -> Iterator[Trained]:
    """Take what was trained of parameters out of `parts`, tensors by module and ending; raises AdapterError."""
    if not config.get("target_parameters"):
        return
    wrapped: dict[str, dict[int, str]] = {}
    for module, own in parts.items():
        if not own.keys() & _ROLES.keys():
            continue  # rows of tokens, say
        root, depth = module, 0
        while root.endswith(_INNER):
            root, depth = root.removesuffix(_INNER), depth + 1
        wrapped.setdefault(root, {})[depth] = module
    for root, levels in wrapped.items():
        names = _targeted(root, config["target_parameters"])
        if not names or (config.get("target_modules") and is_targeted(config_file, config, root)):
            continue
        if sorted(levels) != list(range(len(levels))):
            raise AdapterError(f"{file}: of the parameters of {root} that were trained some are missing; save it again")
        chosen = _chosen(file, root, names, len(levels))
        for depth, name in zip(sorted(levels, reverse=True), chosen, strict=True):
            tensors = parts.pop(levels[depth])
            where = f"{file}: shard " + " and ".join(f"{one.name} {list(one.shape)}" for one in tensors.values())
            if tensors.keys() - _ROLES.keys() or any(0 in one.shape for one in tensors.values()):
                raise AdapterError(f"{where} is no LoRA of a parameter; save the adapter again")
            roles = {_ROLES[ending]: one for ending, one in tensors.items()}
            shapes = {role: one.shape for role, one in roles.items()}
            numbers = METHODS["lora_parameter"].read(config, f"{root}.{name}", shapes, where)
            assert numbers is not None
            others = tuple(one for one in names if one not in chosen)
            yield Trained(f"{root}.{name}", "lora_parameter", roles, {**numbers, "others": others})


def _targeted(root: str, targets: list[str]) -> dict[str, bool]:
    """Names of parameters that `root` may have and the config targets, and whether it names their module as well."""
    found: dict[str, bool] = {}
    for target in targets:
        module, _, name = target.rpartition(".")
        if not module or root == module or root.endswith(f".{module}"):
            found[name] = found.get(name, False) or bool(module)
    return found


def _chosen(file: Path, root: str, names: Mapping[str, bool], count: int) -> list[str]:
    """The `count` parameters of `root` that were trained, the innermost first."""
    chosen = list(names) if len(names) == count else [name for name, in_full in names.items() if in_full]
    if len(chosen) != count:
        raise AdapterError(
            f"{file}: holds {count} trained parameters of {root}, and target_parameters has {listed(list(names))} for "
            "it, so which these are cannot be told; name them there with their module (experts.down_proj)"
        )
    if count > 1 and not set(chosen) <= set(ORDER):
        raise AdapterError(
            f"{file}: holds {count} trained parameters of {root} ({listed(chosen)}), whose order in the model is not "
            "known here; merge it with PEFT"
        )
    return sorted(chosen, key=ORDER.index) if count > 1 else chosen
