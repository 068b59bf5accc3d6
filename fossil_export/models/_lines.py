"""The file of the table: one JSON object with a line for each model type, which is read without the others.

`rules NAME` is the conversion of a class or model type that has one. `_survey` says what is in a line, `make_table` how
it is written.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "architectures.json"
_EMPTY: dict[str, Any] = {"auto": ["", "", {}], "of": {}, "parts": {}, "prefix": "", "ties": {}}


@cache
def text() -> str:
    """The whole file."""
    return (files(__package__) / FILE).read_text("utf-8")


@cache
def _line(key: str) -> Any:
    whole = text()
    start = f"\n{json.dumps(key)}: "
    at = whole.find(start)
    if at < 0:
        return None
    end = whole.index("\n", at + 1)
    return json.loads(whole[at + len(start) : end].rstrip(","))


def line(model_type: str) -> Any:
    """A model type's line, as read; None if it has none."""
    row = _line(model_type) if not model_type.startswith("rules ") else None
    return {**_EMPTY, **row} if isinstance(row, dict) else None


def conversion(name: str) -> list[Any] | None:
    """The rules of a class or model type, as `full` gives them; None if it has none."""
    rules = _line(f"rules {name}")
    if isinstance(rules, str):
        return conversion(rules)
    return None if rules is None else [_resolved(rule) for rule in rules]


def _resolved(rule: Any) -> list[Any]:
    if isinstance(rule, str):
        owner, number = rule.rsplit(" ", 1)
        rule = _line(f"rules {owner}")[int(number)]
    return full(*rule)


def short(rule: list[Any]) -> list[Any]:
    """What is written for a rule: [kind, sources, targets, back, operations, offset], without what goes without saying.

    A list of one is its item; `back` is 0 if it is the way back; the kind is dropped of a plain renaming.
    """
    kind, sources, targets, back, operations, offset = rule
    given = [kind, _short(sources), _short(targets), 0 if back == [targets, sources] else back, operations, offset]
    while len(given) > 3 and not given[-1]:
        given.pop()
    return given[1:] if kind == "WeightRenaming" and len(given) == 3 else given


def full(*given: Any) -> list[Any]:
    """The rule of `short`."""
    rule = ["WeightRenaming", *given] if len(given) == 2 else list(given)
    kind, sources, targets, back, operations, offset = rule + [0, [], 0][len(rule) - 3 :]
    sources, targets = _long(sources), _long(targets)
    return [kind, sources, targets, back or [targets, sources], operations, offset]


def _short(patterns: list[str]) -> Any:
    return patterns[0] if len(patterns) == 1 else patterns


def _long(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def short_autos(autos: dict[str, str]) -> list[Any]:
    """What is written for the classes by auto class: the beginning that most have, how these go on, and the others."""
    starts = [name.removesuffix(_end(auto)) for auto, name in autos.items() if name.endswith(_end(auto))]
    start = max(sorted(set(starts)), key=starts.count, default="")
    regular = [auto for auto, name in autos.items() if auto.startswith("AutoModel") and name == start + _end(auto)]
    return [start, " ".join(map(_end, regular)), {auto: autos[auto] for auto in autos if auto not in regular}]


def _end(auto: str) -> str:
    return auto.removeprefix("AutoModel") or "Model"


def classes(model_type: str) -> dict[str, str]:
    """The class that each auto class of transformers makes for a model type; {} for one that is not in the table."""
    row = line(model_type)
    if row is None:
        return {}
    start, ends, others = row["auto"]
    regular = {"AutoModel" + ("" if end == "Model" else end): start + end for end in ends.split()}
    return dict(sorted({**regular, **others}.items()))


def model_types() -> tuple[str, ...]:
    """The model types of the table."""
    starts = (row.split('"', 2)[1] for row in text().splitlines() if row.startswith('"'))
    return tuple(name for name in starts if not name.startswith("rules ") and name != "made of")


def type_of(class_name: str) -> str | None:
    """The model type whose auto classes make a class of this name; None if there is none, or it is not clear which."""
    wanted = json.dumps(class_name)
    kinds = [row.split('"', 2)[1] for row in text().splitlines() if row.startswith('"') and wanted in row]
    found = [kind for kind in kinds if class_name in classes(kind).values()]
    if len(found) > 1:
        found = [kind for kind in found if class_name.lower().startswith(kind.replace("_", "").replace("-", ""))]
    return found[0] if len(found) == 1 else None
