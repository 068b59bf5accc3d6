"""LoRA on repeated layers (`layer_replication`): the base as the trainer saw it, with layers of their own.

PEFT makes a new list of layers out of ranges of the old ones, which share the old weights, and trains a LoRA for each.
Here the base's headers are read so that the bytes of an old layer have the names of all layers that are made of it.
Source: `replicate_layers` in peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import MergeError

_LISTS = ("model.layers", "layers", "bert.encoder.layer", "encoder.layer", "h")
"""Where PEFT finds the layers of a model."""

ALIKE = (
    "bert", "cohere", "gemma", "granite", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "stablelm", "starcoder2",
)  # fmt: skip
"""Types of models whose layers do not depend on their number."""

TYPED = ("qwen2", "qwen3")
"""Types whose layers are alike if the config gives them one type."""

_KEY = "replicated layers"


def replicated(adapters: Iterable[Adapter], base: Checkpoint) -> Checkpoint:
    """The base as the adapters see it: itself, or with layers repeated as their configs say.

    Raises MergeError if adapters differ in that, or if the base's layers cannot be repeated.
    """
    maps = {repr(one.config.get("layer_replication") or []): one for one in adapters}
    if len(maps) > 1:
        paths = " and ".join(str(one.path) for one in maps.values())
        raise MergeError(f"{paths}: were trained on other layers of the base (layer_replication); merge one of them")
    adapter = next(iter(maps.values()), None)
    wanted = adapter.config.get("layer_replication") if adapter is not None else None
    if adapter is None or not wanted or base.found.get(_KEY) is True:
        return base
    key = f"{_KEY} {wanted}"
    if key not in base.found:
        base.found[key] = _made(adapter, wanted, base)
    found: Checkpoint = base.found[key]
    return found


def refuse_replicated(adapter: Adapter, base: Checkpoint) -> None:
    """Raise MergeError for an adapter whose layers are repeated ones, with a base whose are not."""
    if adapter.config.get("layer_replication") and base.found.get(_KEY) is not True:
        raise MergeError(
            f"{adapter.path}: was trained on layers of {base.location} that were repeated (layer_replication), which "
            "only a merge makes; merge it, and go on with the merged model"
        )


def _made(adapter: Adapter, ranges: Sequence[Any], base: Checkpoint) -> Checkpoint:
    where = f"{adapter.path}: layer_replication {ranges}"
    config = base.config or {}
    count, model_type = config.get("num_hidden_layers"), config.get("model_type")
    if model_type not in (*ALIKE, *TYPED) or not isinstance(count, int):
        raise MergeError(
            f"{where}: whether layers of {base.location} ({model_type}) may have other numbers is not known; merge it "
            "with PEFT, and see that the result answers as the trained model did"
        )
    sources: list[int] = []
    for start, stop in ranges:
        if not 0 <= start < stop <= count:
            raise MergeError(f"{where}: the base has {count} layers; name the base it was trained from with --base")
        sources += range(start, stop)
    root, prefix = _prefix(adapter, base, where)
    pattern = re.compile(rf"{re.escape(root)}\.(\d+)(\..+)")
    copies: dict[int, list[int]] = {}
    for number, source in enumerate(sources):
        copies.setdefault(source, []).append(number)
    held = {int(match[1]) for name in base.tensors if (match := pattern.fullmatch(name))}
    if held != set(range(count)):
        raise MergeError(f"{where}: {base.location} holds {len(held)} of {count} layers ({prefix}); fetch it again")

    def named(info: TensorInfo) -> Iterable[TensorInfo]:
        match = pattern.fullmatch(info.name)
        if match is None:
            return [info]
        return [replace(info, name=f"{root}.{number}{match[2]}") for number in copies.get(int(match[1]), ())]

    files = tuple(
        replace(header, tensors=tuple(one for info in header.tensors for one in named(info)), derived=True)
        for header in base.files
    )
    return replace(
        base,
        files=files,
        config=_config(config, sources, where),
        tensors={info.name: info for header in files for info in header.tensors},
        found={_KEY: True},
    )


def _prefix(adapter: Adapter, base: Checkpoint, where: str) -> tuple[str, str]:
    """What the files call the list of layers, and what the model does."""
    modules = [one.module for one in adapter.trained.values()]
    used = [one for one in _LISTS if any(re.match(rf"{re.escape(one)}\.\d+\.", module) for module in modules)]
    stored = [one for one in (*_LISTS, "transformer.h") if any(name.startswith(f"{one}.0.") for name in base.tensors)]
    if len(used) != 1 or len(stored) != 1 or stored[0].rpartition(".")[2] != used[0].rpartition(".")[2]:
        raise MergeError(f"{where}: the layers that were repeated cannot be told among the base's; merge it with PEFT")
    return stored[0], used[0]


def _config(config: Mapping[str, Any], sources: Sequence[int], where: str) -> dict[str, Any]:
    """The config with so many layers, which must be of one type: a trained model has layers that were made by the old
    list, and looks its masks up in that by their new numbers."""
    found = {**config, "num_hidden_layers": len(sources)}
    types = config.get("layer_types")
    mixed = config.get("use_sliding_window") and config.get("model_type") in TYPED
    if mixed if types is None else not isinstance(types, list) or len(set(types)) != 1:
        raise MergeError(f"{where}: the base's layers are of several types (layer_types), which cannot be renumbered")
    if types:
        found["layer_types"] = [types[0]] * len(sources)
    return found
