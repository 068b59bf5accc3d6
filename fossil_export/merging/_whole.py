"""Does the base hold what its config speaks of? What a class lacks in the files, its loaders make of random numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fossil_export import models
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.merging._naming import names_in
from fossil_export.models import Names, pattern_of

_COUNT = "num_hidden_layers"
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


def unlike_its_config(base: Checkpoint) -> Iterator[str]:
    """What of `base` its class would not load as it is, one line each.

    The installed transformers is asked only if something looks odd: fewer layers are stored than the config counts, or
    one tensor has a shape that its kind has in no other layer. Without it, or for code of the base's own, nothing is
    said.
    """
    config = base.config or {}
    if "auto_map" in config:
        return
    for name in config.get("architectures") or ():
        if (names := names_in(name, base, False)) is not None:
            yield from _missing_layers(name, names, config)
            yield from _other_shapes(name, names, base, config)


def _missing_layers(name: str, names: Names, config: Mapping[str, Any]) -> Iterator[str]:
    """It is asked for a model of one layer more than is stored, for a count may be absurd."""
    for path in ((), ("text_config",)):
        part = config.get(path[0]) if path else config
        count = part.get(_COUNT) if isinstance(part, Mapping) else None
        stored = _layers([*names.whole, *names.converted])
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < stored < count:
            continue
        less, more = (_with_count(config, path, number) for number in (stored, stored + 1))
        one, other = (models.architecture(each, name, exact=True) for each in (less, more))
        if one is None or other is None or one.shapes is None or other.shapes is None:
            continue
        if missing := [key for key in other.shapes if key not in one.shapes and not names.holds(key)]:
            where = ".".join((*path, _COUNT))
            yield f"config.json: {where} is {count:,}, and the files hold {stored} layers (no {missing[0]})"


def _layers(parameters: Iterable[str]) -> int:
    return max((int(match[1]) + 1 for one in parameters if (match := _LAYER.search(one))), default=0)


def _with_count(config: Mapping[str, Any], path: tuple[str, ...], count: int) -> dict[str, Any]:
    """The config with so many layers, and as many of what it lists by layer."""
    part = dict(config[path[0]] if path else config)
    types = part.get("layer_types")
    if isinstance(types, list) and types:
        part["layer_types"] = (types * (count // len(types) + 1))[:count]
    part[_COUNT] = count
    return {**config, path[0]: part} if path else part


def _other_shapes(name: str, names: Names, base: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    odd = _odd(names, base, config)
    exact = models.architecture(config, name, exact=True) if odd else None
    shapes = (exact.shapes if exact is not None else None) or {}
    for parameter in odd:
        stored, wanted = base.tensors[names.whole[parameter]], shapes.get(parameter)
        if wanted is not None and wanted != stored.shape:
            yield f"{stored.name} has shape {list(stored.shape)}, and {name} of that config.json has {list(wanted)}"


def _odd(names: Names, base: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Parameters whose shape is that of no other of their kind, among kinds that are in several layers; and embedding,
    head and norms whose width is no number of the config."""
    kinds: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for parameter, stored in names.whole.items():
        kinds.setdefault(pattern_of(parameter), {}).setdefault(base.tensors[stored].shape, []).append(parameter)
    found = []
    for shapes in kinds.values():
        if len(shapes) > 1:
            found += [one for members in shapes.values() if len(members) == 1 for one in members]
    numbers = set(_numbers(config))
    for parameter, stored in names.whole.items():
        shape = base.tensors[stored].shape
        is_wide = parameter.rpartition(".")[0] in (names.model.embedding, names.model.head)
        if (is_wide and shape[1:]) or parameter.endswith("norm.weight"):
            found += [parameter] if shape and shape[-1] not in numbers else []
    return list(dict.fromkeys(found))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
