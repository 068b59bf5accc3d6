"""What an architecture is: names in files and in the model, ties, heads; asked of transformers or its table."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from fossil_export.models import _lines, _table
from fossil_export.models._architecture import Architecture, Operation, Rule, Tie, pattern_of
from fossil_export.models._inventory import Conversion, Names
from fossil_export.models._look import look
from fossil_export.models._pieces import Pieces, Run, Unknown, pieces_of
from fossil_export.models._rules import Passes


def architecture(config: Mapping[str, Any], class_name: str, *, exact: bool = False) -> Architecture | None:
    """The class of transformers of that name, for a model with this config.json; None if it is not known.

    It comes from the table that is shipped; with `exact` from the installed transformers, which takes seconds to import
    and knows the shapes, or models that are newer than the table.
    """
    config = _typed(config)
    if exact:
        from fossil_export.models import _transformers

        return _transformers.read(config, class_name)
    return _table.read(config, class_name)


def classes(config: Mapping[str, Any], *, exact: bool = False) -> Mapping[str, str]:
    """The classes of the config's model type, by the auto class that makes them (`AutoModelForCausalLM`)."""
    model_type = _typed(config).get("model_type")
    if not isinstance(model_type, str):
        return {}
    if exact:
        from fossil_export.models import _transformers

        return _transformers.classes(model_type)
    return _table.classes(model_type)


def made_alike(one: Mapping[str, Any], other: Mapping[str, Any], but: Collection[str] = ()) -> bool:
    """Whether the installed transformers makes equal configs of both, but for some fields; False if it is not known."""
    from fossil_export.models import _transformers

    return _transformers.made_alike(_typed(one), _typed(other), but)


def bypassed(config: Mapping[str, Any]) -> frozenset[str]:
    """Ends of the names of linear layers that the model of this config, or a part of it, computes with but never calls.

    Their trainer did not see what was trained beside the call. Made by benchmarks/sweep/bypassed.py.
    """
    known: dict[str, list[str]] = json.loads((files(__package__) / "bypassed.json").read_text("utf-8"))
    parts = [_typed(config), *(part for part in config.values() if isinstance(part, Mapping))]
    return frozenset(name for part in parts for name in known.get(str(part.get("model_type")), ()))


def _typed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with a model type, which old ones lack: that of the class they name."""
    if "model_type" in config:
        return config
    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    found = next((kind for name in named if (kind := _lines.type_of(name)) is not None), None)
    return {**config, "model_type": found} if found is not None else config


__all__ = [
    "Architecture",
    "Conversion",
    "Names",
    "Operation",
    "Passes",
    "Pieces",
    "Rule",
    "Run",
    "Tie",
    "Unknown",
    "architecture",
    "bypassed",
    "classes",
    "look",
    "made_alike",
    "pattern_of",
    "pieces_of",
]
