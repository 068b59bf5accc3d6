"""Which classes there are: those of transformers' auto mappings, each once."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class Entry:
    """A model class; `model_type` is the first that the mappings name it for."""

    name: str
    model_type: str


def mappings() -> dict[str, dict[str, Any]]:
    return {
        name: value
        for name, value in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_NAMES") and isinstance(value, dict)
    }


@cache
def entries() -> tuple[Entry, ...]:
    found: dict[str, str] = {}
    for mapping in mappings().values():
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return tuple(Entry(name, model_type) for name, model_type in sorted(found.items(), key=lambda item: item[::-1]))


def model_class(name: str) -> Any:
    """Raises AttributeError for a class that only the mappings know."""
    return getattr(transformers, name)


def config_class(name: str) -> Any:
    return model_class(name).config_class


def varied(chosen: list[Entry]) -> list[Entry]:
    """One class of each family, then the second of each, and so on; those with heads come first."""
    turns: dict[str, int] = {}
    placed = []
    for entry in sorted(chosen, key=lambda each: (each.name.endswith("Model"), each.name)):
        turns[entry.model_type] = turns.get(entry.model_type, 0) + 1
        placed.append((turns[entry.model_type], entry.model_type, entry))
    return [entry for _, _, entry in sorted(placed, key=lambda each: each[:2])]


def sample(chosen: list[Entry], count: int) -> list[Entry]:
    """As different as can be: the mappings take turns, and none takes a family that is there while others are left."""
    known = {entry.name: entry for entry in chosen}
    turns = []
    for mapping in mappings().values():
        there = {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}
        turns.append(sorted(there & set(known), key=lambda name: zlib.crc32(name.encode())))
    taken: dict[str, Entry] = {}
    families: set[str] = set()
    while len(taken) < count and any(turns):
        for names in turns:
            fresh = [name for name in names if name not in taken]
            name = next((each for each in fresh if known[each].model_type not in families), next(iter(fresh), None))
            names[:] = [each for each in fresh if each != name]
            if name is not None and len(taken) < count:
                taken[name] = known[name]
                families.add(known[name].model_type)
    return list(taken.values())
