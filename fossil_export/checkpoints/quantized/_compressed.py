"""What a config of compressed-tensors says: which module is quantized, how, and in which form it is stored.

Source: `QuantizationConfig`, `QuantizationScheme` and `QuantizationArgs` in compressed_tensors/quantization, and
`match_named_modules` and `match_targets` in compressed_tensors/utils/match.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fossil_export._patterns import Pattern, PatternError, pattern_of
from fossil_export.checkpoints.quantized._format import Stored
from fossil_export.errors import CheckpointError

METHOD = "compressed-tensors"
UNDER = "quantization_config"
TOP = {
    *("quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio"),
    *("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config", "version"),
    *("run_compressed", "dequantize", "use_optimized_inference"),
}
GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
ACTIVATIONS = ("input_activations", "output_activations")
ARGS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
SPARSE = (None, "dense")
STATUSES = (None, "initialized", "calibration", "frozen", "compressed")


@dataclass(frozen=True)
class Weights:
    """How weights are quantized: `bits` of a `kind` ("int" or "float"), one scale per what `strategy` says.

    `group` is the number of columns of strategies "group" and "tensor_group", `block` (rows, columns) that of "block".
    Without `symmetric` there are zero points. `actorder`: "weight", "group", or None.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    actorder: str | None


@dataclass(frozen=True)
class Group:
    """One of `config_groups`: whose weights it describes, how they are quantized (None: they are not), and the
    `format` in which they are stored ("pack-quantized", say)."""

    name: str
    targets: tuple[str, ...]
    weights: Weights | None
    format: str


@dataclass(frozen=True)
class Compressed:
    """A whole config: its groups, and the modules that none of them has."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    _known: dict[str, Group | None] = field(default_factory=dict, repr=False, compare=False)

    def group_of(self, module: str) -> Group | None:
        """The group that describes the weight of a module ("model.layers.0.mlp.up_proj"); None if it is ignored, or no
        target. Names go before patterns and patterns before classes, as in the library. Of classes only Linear and
        Embedding are known: a checkpoint has no others."""
        if module not in self._known:
            self._known[module] = self._group_of(module)
        return self._known[module]

    def _group_of(self, module: str) -> Group | None:
        kind = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
        names, patterns = self._ignored
        if module in names or kind in names or any(one.match(module) is not None for one in patterns):
            return None
        by_name, by_pattern = self._targets
        if (found := by_name.get(module)) is not None:
            return found
        return next((group for one, group in by_pattern if one.match(module) is not None), by_name.get(kind))

    @cached_property
    def _ignored(self) -> tuple[set[str], list[Pattern]]:
        patterns = [pattern_of(one[3:]) for one in self.ignore if one.startswith("re:")]
        return {one for one in self.ignore if not one.startswith("re:")}, patterns

    @cached_property
    def _targets(self) -> tuple[dict[str, Group], list[tuple[Pattern, Group]]]:
        """By name, and by pattern; of two groups with the same target the later one has it."""
        found = {target: group for group in self.groups for target in group.targets}
        patterns = [(pattern_of(one[3:]), found[one]) for one in sorted(found) if one.startswith("re:")]
        return {one: group for one, group in found.items() if not one.startswith("re:")}, patterns


def compressed(stored: Stored) -> Compressed:
    """What the config of a checkpoint says. Raises CheckpointError for what cannot be or is not known."""
    settings = stored.settings or {}
    _known_only(stored, settings, TOP, UNDER)
    _refuse_others(stored, settings)
    form = settings.get("format")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _wrong(stored, "config_groups", groups, "a map of groups")
    ignore = settings.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(one, str) for one in ignore):
        raise _wrong(stored, "ignore", ignore, "a list of names")
    found = Compressed(tuple(_group(stored, name, one, form) for name, one in groups.items()), tuple(ignore))
    for pattern in (*ignore, *(one for group in found.groups for one in group.targets)):
        if pattern.startswith("re:"):
            try:
                pattern_of(pattern[3:])
            except PatternError as problem:
                raise stored.error(UNDER, f"has the pattern {pattern!r:.200}, which {problem}; mend it") from None
    return found


def _group(stored: Stored, name: str, entry: Any, form: Any) -> Group:
    at = f"config_groups.{name}"
    if not isinstance(entry, dict):
        raise stored.error(UNDER, f"has {at} as {entry!r}, a preset; write its scheme out")
    _known_only(stored, entry, GROUP, at)
    targets = entry.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise _wrong(stored, f"{at}.targets", targets, "a list of names")
    own = entry.get("format") or form
    if not isinstance(own, str):
        raise _wrong(stored, f"{at}.format", own, "the name of a format")
    for key in ACTIVATIONS:  # they change no weight, but the library must be able to read what --requantize writes
        if not isinstance(entry.get(key), (dict, type(None))):
            raise _wrong(stored, f"{at}.{key}", entry[key], "a map")
    weights = entry.get("weights")
    return Group(name, tuple(targets), None if weights is None else _weights(stored, f"{at}.weights", weights), own)


def _weights(stored: Stored, at: str, args: Any) -> Weights:
    if not isinstance(args, dict):
        raise _wrong(stored, at, args, "a map")
    _known_only(stored, args, ARGS, at)
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float"):
        raise stored.error(UNDER, f"has {at} of {bits!r} bits and type {kind!r}; known are 1 to 8 bits, int and float")
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise _wrong(stored, f"{at}.symmetric", symmetric, "true or false")
    if args.get("dynamic"):
        raise _wrong(stored, f"{at}.dynamic", args["dynamic"], "false, as it must be for weights")
    group, strategy = args.get("group_size"), args.get("strategy")
    if group is not None and (type(group) is not int or group < -1):
        raise _wrong(stored, f"{at}.group_size", group, "a size")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy not in STRATEGIES:
        raise _wrong(stored, f"{at}.strategy", strategy, f"one of {', '.join(STRATEGIES)}")
    by_group = strategy in ("group", "tensor_group")
    if by_group != (group is not None and group > 0):
        raise stored.error(UNDER, f"has {at} with strategy {strategy!r} and group_size {group!r}; mend it")
    block = _block(stored, f"{at}.block_structure", args.get("block_structure"))
    if (strategy == "block") != (block is not None):
        raise stored.error(UNDER, f"has {at} with strategy {strategy!r} and block_structure {block!r}; mend it")
    order = args.get("actorder")
    order = {"static": "weight", "dynamic": "group"}.get(order, order) if isinstance(order, str) else order or None
    if order not in (None, "weight", "group"):
        raise _wrong(stored, f"{at}.actorder", order, "weight, group or null")
    return Weights(bits, kind, symmetric, strategy, group if by_group else None, block, order)


def _block(stored: Stored, at: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):  # "128x128", as older versions write
        value = [int(one) if one.isdecimal() else one for one in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one > 0 for one in value):
        raise _wrong(stored, at, value, "two sizes")
    return value[0], value[1]


def _refuse_others(stored: Stored, settings: Mapping[str, Any]) -> None:
    """What is about more than the weights' own codes."""
    sparsity = settings.get("sparsity_config") or {}
    form = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if form not in SPARSE:
        raise stored.error(UNDER, f"has the sparsity_config {form!r}; sparse weights are not read, take a dense base")
    transforms = settings.get("transform_config") or {}
    if not isinstance(transforms, dict) or transforms.get("config_groups"):
        raise stored.error(
            UNDER, "has a transform_config: its weights are rotated, and activations too; take the base without it"
        )
    if settings.get("moe_sparsity_config") is not None:
        raise stored.error(UNDER, "has a moe_sparsity_config: its experts are pruned; take a base that has them all")
    # Older versions write "frozen" beside codes: what is stored is told by the tensors.
    status = settings.get("quantization_status")
    if status not in STATUSES:
        raise _wrong(stored, "quantization_status", status, "a status of compressed-tensors")


def _known_only(stored: Stored, entry: Mapping[str, Any], known: set[str], at: str) -> None:
    if strange := sorted(set(entry) - known):
        raise stored.error(
            UNDER, f"has the field {strange[0]!r} in {at}, which is not known; leave it out, or report it"
        )


def _wrong(stored: Stored, at: str, value: Any, wanted: str) -> CheckpointError:
    return stored.error(UNDER, f"has {at} as {value!r}, not {wanted}; mend it")
