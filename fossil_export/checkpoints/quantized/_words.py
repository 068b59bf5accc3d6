"""What the formats share that pack codes in words of 32 bits, with `X.scales` and `X.qzeros` beside `X.qweight`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import Stored
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

CODES = ".qweight"
PARTS = (".qzeros", ".scales", ".g_idx")
SCALES = ("F16", "BF16")
AUTO_ROUND = "export it as auto_round:auto_gptq or auto_round:auto_awq"

CHANGING = ("rotation", "rotation_config", "adapter", "activation")
"""Fields of a config that change what the layers compute."""


def is_auto_round(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("quant_method")).replace("_", "-") in ("auto-round", "intel/auto-round")


def refused(info: TensorInfo, problem: str) -> CheckpointError:
    return CheckpointError(f"{info.path}: {info.name} {problem}")


def whole_scales(info: TensorInfo, scales: Array) -> Array:
    """The scales in float32; raises CheckpointError if some are no numbers."""
    import numpy as np

    found: Array = scales.astype(np.float32)
    if not np.isfinite(found).all():
        raise refused(info, "holds infinite or NaN values; the base is damaged, fetch it again")
    return found


@dataclass(frozen=True)
class Settings:
    """What a config says of its modules: the `bits` and `groups` (-1: one group) that some have. `sym` and `desc_act`
    are None if it says nothing, or not the same of all."""

    bits: frozenset[int]
    groups: frozenset[int]
    sym: bool | None
    desc_act: bool | None

    def beside(self, stored: Stored, module: str, codes: TensorInfo) -> tuple[TensorInfo, TensorInfo]:
        """The zeros and scales beside the codes of a module; raises CheckpointError."""
        if len(codes.shape) != 2 or codes.dtype != "I32" or not all(codes.shape):
            raise stored.error(codes, f"is stored as {codes.dtype}, and must be a matrix of I32; it is not read")
        zeros, scales = (stored.tensors.get(f"{module}{part}") for part in PARTS[:2])
        if zeros is None or scales is None:
            lost = PARTS[0] if zeros is None else PARTS[1]
            raise stored.error(codes, f"has no {module}{lost} beside it; fetch that file again")
        if len(zeros.shape) != 2 or zeros.dtype != "I32" or not all(zeros.shape):
            raise stored.error(zeros, f"is stored as {zeros.dtype}, and must be a matrix of I32; it is not read")
        if len(scales.shape) != 2 or scales.dtype not in SCALES:
            raise stored.error(scales, f"is stored as {scales.dtype}, and must be a matrix of {' or '.join(SCALES)}")
        return zeros, scales

    def group(self, stored: Stored, scales: TensorInfo, width: int, ordered: bool) -> int:
        """The columns of a group, by the number of scales; raises CheckpointError if no group of the config has so
        many. If the groups are `ordered` by a tensor, any that fits will do."""
        sizes = {width if group == -1 else min(group, width) for group in self.groups}
        fit = sorted(size for size in sizes if -(-width // size) == scales.shape[0])
        if not fit or (len(fit) > 1 and not ordered):
            raise stored.error(
                scales,
                f"is not that of {width} inputs in groups of {' or '.join(map(str, sorted(sizes)))}; config.json or "
                "this file is of another base, fetch both again",
            )
        return fit[-1]


def read_settings(stored: Stored, known: Collection[int], bits: str = "bits", group: str = "group_size") -> Settings:
    """The settings for all modules, and those that some have of their own (`dynamic` of GPTQModel, `extra_config` of
    Auto-Round). Raises CheckpointError for those that would change what is computed."""
    found = stored.settings or {}
    rules = [found]
    for field in ("dynamic", "extra_config"):
        own = found.get(field) or {}
        if not isinstance(own, Mapping) or not all(isinstance(rule, Mapping) for rule in own.values()):
            raise stored.error(field, f"is {own!r} in config.json, not settings by module; mend it")
        rules += own.values()
    for rule in rules:
        for name in CHANGING:
            if rule.get(name):
                raise stored.error(name, f"is {rule[name]!r} in config.json: layers that do more are not read")
        if rule is not found and (rule.get("format") or rule.get("checkpoint_format")):
            raise stored.error(
                "dynamic", "names a format of its own for some modules in config.json, which is not read"
            )
    if found.get("pack_dtype", "int32") not in ("int32", "I32"):
        raise stored.error("pack_dtype", f"is {found['pack_dtype']!r} in config.json; read is int32")
    # Auto-Round says "bits": 16 of the layers that it leaves as they are.
    sizes = [rule[bits] for rule in rules if rule.get(bits) is not None and (rule is found or rule[bits] != 16)]
    groups = [rule[group] for rule in rules if rule.get(group) is not None]
    if not sizes or any(type(one) is not int or one not in known for one in sizes):
        wanted = ", ".join(map(str, known))
        raise stored.error(bits, f"is {_values(sizes)} in config.json; read are {wanted}")
    if not groups or any(type(one) is not int or one == 0 or one < -1 for one in groups):
        raise stored.error(group, f"is {_values(groups)} in config.json, no size; mend it")
    return Settings(frozenset(sizes), frozenset(groups), _same(rules, "sym"), _same(rules, "desc_act"))


def _values(found: list[Any]) -> str:
    return ", ".join(sorted(set(map(repr, found)))) or "not there"


def _same(rules: list[Mapping[str, Any]], field: str) -> bool | None:
    values = [rule[field] for rule in rules if rule.get(field) is not None]
    return values[0] if values and all(value is values[0] for value in values) and type(values[0]) is bool else None


def left_over(stored: Stored, taken: Collection[str]) -> None:
    """Raise CheckpointError for a scale that belongs to no weight: of activations, say, which are divided by it. And if
    no weight is quantized."""
    if not taken:
        raise stored.error(
            "config.json",
            "says that the model is quantized, and no weight is (*.qweight); take quantization_config out",
        )
    for name, info in stored.tensors.items():
        if name.endswith(PARTS) and name not in taken:
            raise stored.error(info, "belongs to no quantized weight; the dequantized model would lack it")
