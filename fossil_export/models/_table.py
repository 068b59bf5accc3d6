"""What a model class is, from the table made out of the pinned transformers; needs neither it nor PyTorch.

The file is one JSON object with one line a model type (and `rules NAME` for a class or model type with a conversion),
so that one line is found and read without the others. `_survey` says what a line holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from fossil_export.models import _names
from fossil_export.models._architecture import Architecture, Operation, Rule, Tie, pattern_of

FILE = "architectures.json"
TIE = "tie_word_embeddings"
_DEEPEST = 12


def read(config: Mapping[str, Any], class_name: str) -> Architecture | None:
    """What class `class_name` is for the content of a config.json; its shapes are not known.

    None if the table has no such class for that model type.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not isinstance(class_name, str) or (row := line(kind)) is None:
        return None
    path = row["of"].get(class_name, "") if class_name not in row["classes"] else ""
    root = _Node("", class_name, kind, config, ())
    try:
        nodes = _walk(_part(root, path) if path else root, 0)
    except (KeyError, RecursionError):
        return None
    return _architecture(nodes, kind, config)


def classes(model_type: str) -> dict[str, str]:
    """The class that each auto class of transformers makes for a model type; {} for one that is not in the table."""
    row = line(model_type)
    return dict(row["auto"]) if row else {}


def model_types() -> tuple[str, ...]:
    """The model types of the table."""
    starts = (text.split('"', 2)[1] for text in _text().splitlines() if text.startswith('"'))
    return tuple(name for name in starts if not name.startswith("rules ") and name != "made of")


def type_of(class_name: str) -> str | None:
    """The model type whose auto classes make a class of this name; None if there is none, or it is not clear which."""
    wanted = json.dumps(class_name)
    lines = [text for text in _text().splitlines() if text.startswith('"') and f":{wanted}" in text]
    found = [kind for text in lines if class_name in classes(kind := text.split('"', 2)[1]).values()]
    if len(found) > 1:
        found = [kind for kind in found if class_name.lower().startswith(kind.replace("_", "").replace("-", ""))]
    return found[0] if len(found) == 1 else None


@cache
def _text() -> str:
    return (files(__package__) / FILE).read_text("utf-8")


@cache
def _line(key: str) -> Any:
    text = _text()
    start = f"\n{json.dumps(key)}: "
    at = text.find(start)
    if at < 0:
        return None
    end = text.index("\n", at + 1)
    return json.loads(text[at + len(start) : end].rstrip(","))


def line(model_type: str) -> Any:
    """A model type's line, as read; None if it has none."""
    row = _line(model_type) if not model_type.startswith("rules ") else None
    return None if not isinstance(row, dict) else {"auto": {}, "of": {}, "parts": {}, "ties": {}, **row}


@dataclass(frozen=True)
class _Node:
    """A model inside a model: the module, its class, its config (content, and path in the whole one)."""

    module: str
    kind: str
    model_type: str
    config: Mapping[str, Any]
    path: tuple[str, ...]
    less: frozenset[str] = frozenset()
    record: Mapping[str, Any] | None = None
    inside: tuple[_Node, ...] = ()

    @property
    def own(self) -> Mapping[str, Any]:
        assert self.record is not None
        return self.record


def _part(node: _Node, key: str) -> _Node:
    """The same class for the config at `key` inside the node's; of another model type, that type's like class."""
    usual = line(node.model_type)["parts"][key]
    config: Any = node.config
    for word in key.split("."):
        config = config.get(word) if isinstance(config, Mapping) else None
    config = config if isinstance(config, Mapping) else {}
    given = config.get("model_type") or usual
    kind = node.kind
    if given != usual and isinstance(given, str) and (row := line(given)) is not None:
        kind = _like(node.kind, line(usual), row)
    else:
        given = usual
    return replace(node, kind=kind, model_type=given, config=config, path=(*node.path, *key.split(".")))


def _like(kind: str, usual: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The class of another model type that the same auto class makes. Raises KeyError if none does."""
    if kind in other["classes"]:
        return kind
    autos = [auto for auto, name in usual["auto"].items() if name == kind] or ["AutoModel"]
    found = next((other["auto"][auto] for auto in autos if auto in other["auto"]), None)
    if found is None:
        raise KeyError(kind)
    return str(found)


def _walk(node: _Node, depth: int) -> _Node:
    """The node with its class's record and the models inside it. Raises KeyError if one is not in the table."""
    if depth > _DEEPEST:
        raise KeyError(node.kind)
    record = line(node.model_type)["classes"][node.kind]
    inside = []
    for name, kind, key, *less in record.get("inside", ()):
        child = replace(node, module=_join(node.module, name), kind=kind, less=_names.unpack(less[0] if less else ""))
        if key.startswith("="):
            child = replace(child, model_type=key[1:], config={})
        inside.append(_walk(_part(child, key) if key and key[0] != "=" else child, depth + 1))
    return replace(node, record=record, inside=tuple(inside))


def names(node: _Node) -> frozenset[str]:
    """The names below a node's module, numbers as `*`."""
    found = set(_names.unpack(node.own.get("names", "")))
    for child in node.inside:
        inner = child.module[len(node.module) + 1 :] if node.module else child.module
        found |= {f"{pattern_of(inner)}.{name}" for name in names(child)}
    return frozenset(found - node.less)


def _all(node: _Node) -> list[_Node]:
    return [node, *(below for child in node.inside for below in _all(child))]


def _architecture(root: _Node, kind: str, config: Mapping[str, Any]) -> Architecture:
    everything = _all(root)
    prefix = root.own.get("prefix", "")
    above = {child.module: node for node in everything for child in node.inside}
    return Architecture(
        name=root.kind,
        model_type=kind,
        patterns=names(root),
        prefix=prefix,
        rules=tuple(_rules(everything, prefix)),
        ties=tuple(_ties(everything, kind, config)),
        parts={n.module: (".".join(n.path), n.kind) for n in everything[1:] if n.path != above[n.module].path},
        embedding=_module(root, "embedding"),
        head=_module(root, "head"),
        follows_tie=any(node.own.get("follows") for node in everything) or bool(line(kind).get("scales")),
        ignored=_gathered(everything, "ignored"),
        optional=_gathered(everything, "optional"),
    )


def _gathered(nodes: list[_Node], what: str) -> tuple[str, ...]:
    return tuple(sorted({text for node in nodes for text in node.own.get(what, ())}))


def _module(node: _Node, what: str) -> str | None:
    """The embedding or head: its module's name, or `@` and the model inside that has it, as is usual for embeddings."""
    name = node.own.get(what, "@" + node.own.get("prefix", "") if what == "embedding" else "")
    if not name.startswith("@"):
        return _join(node.module, name) if name else None
    module = _join(node.module, name[1:])
    return next((_module(child, what) for child in node.inside if child.module == module), None)


def _ties(nodes: list[_Node], kind: str, config: Mapping[str, Any]) -> list[Tie]:
    found: dict[str, Tie] = {}
    for node in nodes:
        pairs = node.own.get("ties", ())
        if not pairs:
            continue
        on, switches = _switched(kind, config, node)
        first, *others = switches or ((),)
        for target, source in pairs:
            tie = Tie(_join(node.module, target), _join(node.module, source), on, first, tuple(others))
            if on or tie.target not in found:
                found[tie.target] = tie
    return [found[target] for target in sorted(found)]


def _switched(kind: str, config: Mapping[str, Any], node: _Node) -> tuple[bool, list[tuple[str, ...]]]:
    """Whether a node ties, and the keys that must be false so that it does not."""
    row = line(kind)
    entry = row["ties"].get(".".join(node.path))
    if entry is None:  # deeper than the type's own parts
        own = (*node.path, TIE)
        return _value(kind, config, own, line(node.model_type)["ties"].get("", [False])[0]), [own]
    usual, *keys = entry
    switches = [tuple(key.split(".")) for key, _ in keys]
    return (any(_value(kind, config, tuple(k.split(".")), v) for k, v in keys) if keys else bool(usual)), switches


def _value(kind: str, config: Mapping[str, Any], path: tuple[str, ...], usual: bool) -> bool:
    *above, key = path
    at: Any = config
    for word in above:
        at = at.get(word) if isinstance(at, Mapping) else None
    if not isinstance(at, Mapping):
        return usual
    if key == TIE and str(at.get("model_type", kind)).startswith("lfm2") and "tie_embedding" in at:
        return bool(at["tie_embedding"])
    if isinstance(at.get(key), bool):
        return bool(at[key])
    part, given = line(kind)["parts"].get(".".join(above)), at.get("model_type")
    if above and isinstance(given, str) and given != part and (row := line(given)) is not None:
        return bool(row["ties"].get("", [usual])[0])
    return usual


def _rules(nodes: list[_Node], root: str) -> list[Rule]:
    """The conversion of a model and those inside it, as transformers' get_model_conversion_mapping walks them."""
    found: list[Rule] = []
    seen: dict[str, list[str]] = {}

    def covered(name: str, module: str) -> bool:
        return any(above == "" or module.startswith(above + ".") for above in seen.get(name, ()))

    for node in nodes:
        if covered(node.kind, node.module):
            continue
        rules = _conversion(node.kind)
        by_class = rules is not None
        if not by_class and not covered(node.model_type, node.module):
            rules = _conversion(node.model_type)
        if rules is None:
            continue
        if node.module:
            scope = node.module.removeprefix(root).removeprefix(".")
            rules = [replace(rule, scope=scope, root=root) for rule in rules]
        found += rules
        seen.setdefault(node.kind, []).append(node.module)
        if not by_class:
            seen.setdefault(node.model_type, []).append(node.module)
    return found + (_conversion("legacy") or [])


def _conversion(name: str) -> list[Rule] | None:
    rules = _line(f"rules {name}")
    if isinstance(rules, str):
        rules = _line(f"rules {rules}")
    return None if rules is None else [_rule(*rule) for rule in rules]


def _rule(kind: str, sources: Any, targets: Any, back: Any, operations: Any = (), offset: int = 0) -> Rule:
    steps = tuple(Operation(name, options) for name, options in operations)
    return Rule(kind, tuple(sources), tuple(targets), (tuple(back[0]), tuple(back[1])), steps, offset)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
