"""Which modules and parameters a config of PEFT targets.

Source: `check_target_module_exists` and `_inject_parameters` in peft/tuners/tuners_utils.py, `match_target_against_key`
in peft/utils/other.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fossil_export._patterns import PatternError, pattern_of
from fossil_export.adapters._trained import Trained
from fossil_export.errors import AdapterError, listed
from fossil_export.methods import METHODS

_ANY = r"[^.]*"

ALL_LINEAR = "all-linear"
"""What PEFT writes out as the names that it stands for."""


def check_targets(path: Path, config: Mapping[str, Any], trained: Collection[Trained]) -> None:
    """Raise AdapterError, which names the config at `path`, for a trained module that it does not target."""
    tied = config.get("ensure_weight_tying") and any(one.method == "lora_embedding" for one in trained)
    targets = Targets(path, config)
    names: dict[str, bool] = {}
    for one in trained:
        # Rows of tokens of a LoRA are asked for by another field, and so are parameters.
        if one.method != "lora_tokens" and METHODS[one.method].PARAMETER:
            names.setdefault(one.owner, targets.have(one.owner))
    untold = config.get("target_modules") is None and not config.get("target_parameters")
    if names and untold and any(one.method != "trainable_tokens" for one in trained):
        raise AdapterError(
            f"{path}: target_modules is null, for which PEFT takes what is usual for the type of the model, and may "
            f"leave out what was trained ({listed(list(names), 2)}); write there the names of the modules"
        )
    strays = [name for name, targeted in names.items() if not targeted]
    if all(one.method == "trainable_tokens" for one in trained) and any(names.values()):
        strays = []  # what follows a targeted embedding is saved with it; `_ties` looks at these
    # So is what is tied to an embedding that LoRA changes.
    if strays and not tied:
        raise AdapterError(
            f"{path}: target_modules does not cover {listed(strays)}, for which there are shards; "
            "the files do not belong together"
        )


def is_targeted(path: Path, config: Mapping[str, Any], module: str) -> bool:
    """Whether a config targets a module."""
    return Targets(path, config).have(module)


class Targets:
    """What a config, at `path`, targets."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path, self._config = path, config
        targets, excluded = config.get("target_modules"), config.get("exclude_modules")
        self._ends = Ends(targets if isinstance(targets, list) else ())
        self._excluded = Ends(excluded if excluded and not isinstance(excluded, str) else ())

    def have(self, module: str) -> bool:
        """Whether it targets a module."""
        return _is_targeted(self._path, self._config, module, self._ends, self._excluded)


def _is_targeted(path: Path, config: Mapping[str, Any], module: str, ends: Ends, without: Ends) -> bool:
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        if _matches(path, "exclude_modules", excluded, module):
            return False
    elif without.hold(module):
        return False
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or _matches(path, "target_modules", targets, module)
    if not isinstance(targets, list):
        return not config.get("target_parameters")
    return ends.has(module) or (ends.hold(module) and _in_layers(path, config, module))


def _in_layers(path: Path, config: Mapping[str, Any], module: str) -> bool:
    """Whether a module lies in one of the layers that alone are transformed."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [_ANY]
    for pattern in patterns:
        if (layer := _layer(path, pattern, module)) is not None:
            return layer in (layers if isinstance(layers, list) else [layers])
    return False


def ends_with(name: str, ends: Iterable[Any]) -> bool:
    """Whether a dotted name is one of these, or ends with one."""
    return Ends(ends).hold(name)


class Tails:
    """Ends of texts, wherever they begin, of which there may be as many as there are modules."""

    def __init__(self, tails: Iterable[Any]) -> None:
        self._tails = {tail for tail in tails if isinstance(tail, str)}
        self._lengths = sorted({len(tail) for tail in self._tails})

    def hold(self, text: str) -> bool:
        """Whether a text ends with one of them."""
        return any(text[len(text) - size :] in self._tails for size in self._lengths if size <= len(text))

    def name(self, module: str) -> bool:
        """Whether a part of a dotted name is one of them, or the whole of it ends with one."""
        return not self._tails.isdisjoint(module.split(".")) or self.hold(module)


class Ends:
    """Ends of dotted names, of which there may be as many as there are modules."""

    def __init__(self, ends: Iterable[Any]) -> None:
        own = list(ends)
        self._whole = {end for end in own if isinstance(end, str)}
        self._tails = {f"{end}" for end in own}

    def has(self, name: str) -> bool:
        """Whether a name is one of them."""
        return name in self._whole

    def hold(self, name: str) -> bool:
        """Whether a name is one of them, or ends with one."""
        if name in self._whole:
            return True
        at = name.find(".")
        while at >= 0:
            if name[at + 1 :] in self._tails:
                return True
            at = name.find(".", at + 1)
        return False


def _matches(path: Path, field: str, pattern: str, name: str) -> bool:
    try:
        return pattern_of(pattern).fullmatch(name) is not None
    except PatternError as problem:
        raise AdapterError(f"{path}: {field} {problem}") from problem


def _layer(path: Path, pattern: Any, name: str) -> int | None:
    """The number of the layer that a module lies in, by `layers_pattern`."""
    try:
        if not isinstance(pattern, str):
            raise PatternError(f"is {pattern!r}, not a regular expression")
        found = pattern_of(pattern, r".*?\." if pattern == _ANY else r"(?:^|.*?\.)", r"\.(\d+)\.").match(name)
        return None if found is None else int(found[-1] or -1)
    except PatternError as problem:
        raise AdapterError(f"{path}: layers_pattern {problem}") from problem
