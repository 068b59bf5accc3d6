"""What a model class is, from the table made out of the pinned transformers; needs neither it nor PyTorch.

The models inside a class have lines of their own, so that one of another model type is put in the place of the usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fossil_export.models import _lines, _names
from fossil_export.models._architecture import Architecture, Operation, Rule, Tie, pattern_of
from fossil_export.models._lines import classes, line, model_types

TIE = "tie_word_embeddings"
_DEEPEST = 12
# Patterns that transformers adds for old files, if a model has such a buffer anywhere in it.
ADDED = (r"(^|\.)position_ids$", r"rotary_emb\.inv_freq")
__all__ = ["classes", "line", "model_types", "names", "read"]


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
        root = _part(root, path) if path else root
        root = _walk(root, _record(root).get("over", {}))
    except (KeyError, RecursionError):
        return None
    return _architecture(root, kind, config)


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

    @property
    def prefix(self) -> str:
        return str(self.own.get("prefix", line(self.model_type)["prefix"]))

    def below(self, module: str) -> str:
        """A module's name below this one's."""
        return module[len(self.module) + 1 :] if self.module else module


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
        kind = kind if kind in row["classes"] else _like(kind, classes(usual), classes(given))
    else:
        given = usual
    return replace(node, kind=kind, model_type=given, config=config, path=(*node.path, *key.split(".")))


def _like(kind: str, usual: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The class of another model type that the same auto class makes. Raises KeyError if there is none."""
    autos = [auto for auto, name in usual.items() if name == kind]
    if "AutoModelForCausalLM" in autos:  # BLIP-2 takes either
        autos.append("AutoModelForSeq2SeqLM")
    for auto in autos or ["AutoBackbone" if kind.endswith("Backbone") else "AutoModel"]:
        if auto in other:
            return other[auto]
    raise KeyError(kind)


def _record(node: _Node) -> Mapping[str, Any]:
    row = line(node.model_type)
    if row is None:
        raise KeyError(node.model_type)
    record = row["classes"][node.kind]
    assert isinstance(record, dict)
    return record


def _walk(node: _Node, over: Mapping[str, str], depth: int = 0) -> _Node:
    """The node with its class's record and the models inside it. Raises KeyError if one is not in the table.

    `over` are the classes that models have by module name if they are not the usual ones, "" for one that is not there.
    """
    if depth > _DEEPEST:
        raise KeyError(node.kind)
    record = _record(node)
    inside = []
    for name, kind, key, less, when in (_entry(*entry) for entry in record.get("inside", ())):
        module = _join(node.module, name)
        if (when and not _holds(node.config, *when)) or not (kind := over.get(module, kind)):
            continue
        child = replace(node, module=module, kind=kind, less=_names.unpack("" if module in over else less))
        if key.startswith("="):
            child = replace(child, model_type=key[1:], config={})
        inside.append(_walk(_part(child, key) if key and key[0] != "=" else child, over, depth + 1))
    return replace(node, record=record, inside=tuple(inside))


def _entry(name: str, kind: str, key: str = "", less: str = "", when: Any = ()) -> tuple[str, str, str, str, Any]:
    return name, kind, key, less, when


def _holds(config: Any, key: str, value: Any) -> bool:
    """Whether a config's key has a value, or one that is as true."""
    for word in key.split("."):
        if not isinstance(config, Mapping) or word not in config:
            return False
        config = config[word]
    return bool(config == value if isinstance(value, str) else bool(config) == bool(value))


def has(record: Mapping[str, Any], attribute: str) -> bool:
    """Whether a class's own names or the models in it begin with an attribute."""
    modules = [entry[0] for entry in record.get("inside", ())]
    return attribute in {name.split(".")[0] for name in (*modules, *_names.unpack(record.get("names", "")))}


def names(node: _Node) -> frozenset[str]:
    """The names below a node's module, numbers as `*`."""
    found = set(_names.unpack(node.own.get("names", "")))
    for child in node.inside:
        inner = pattern_of(node.below(child.module))
        found |= {f"{inner}.{name}" for name in names(child)}
    return frozenset(found - node.less)


def _all(node: _Node) -> list[_Node]:
    return [node, *(below for child in node.inside for below in _all(child))]


def _architecture(root: _Node, kind: str, config: Mapping[str, Any]) -> Architecture:
    everything = _all(root)
    prefix = root.prefix
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
        ignored=tuple(sorted(_gathered(root, "ignored"))),
        optional=tuple(sorted(_gathered(root, "optional"))),
    )


def _gathered(node: _Node, what: str) -> set[str]:
    """A model's patterns with those of the models that are its attributes: others are not seen by transformers."""
    found = set(node.own.get(what, ()))
    for child in node.inside:
        inner = _gathered(child, what)
        found |= inner.intersection(ADDED) if "." in node.below(child.module) else inner
    return found


def _module(node: _Node, what: str) -> str | None:
    """The embedding or head: its module's name, or `@` and the model inside that has it, as is usual for embeddings."""
    name = node.own.get(what, "@" + node.prefix if what == "embedding" else "")
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
    if node.path and row["parts"].get(".".join(node.path)) != node.model_type:
        entry = None  # another type's place
    if entry is None:
        own = (*node.path, TIE)
        usual, *keys = line(node.model_type)["ties"].get("", [False, [TIE, False]])
        return (_value(kind, config, own, usual), [own]) if keys else (bool(usual), [])
    usual, *keys = entry
    switches = [_spelled(kind, config, tuple(key.split("."))) for key, _ in keys]
    return (any(_value(kind, config, tuple(k.split(".")), v) for k, v in keys) if keys else bool(usual)), switches


def _spelled(kind: str, config: Mapping[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """A switch by the key that the config has for it."""
    other = line(kind).get("spelled")
    return (other,) if path == (TIE,) and other in config else path


def _value(kind: str, config: Mapping[str, Any], path: tuple[str, ...], usual: bool) -> bool:
    *above, key = path
    at: Any = config
    for word in above:
        at = at.get(word) if isinstance(at, Mapping) else None
    if not isinstance(at, Mapping):
        return usual
    part = line(str(at.get("model_type") or line(kind)["parts"].get(".".join(above), kind)))
    if key == TIE and part is not None and part.get("spelled") in at:
        return bool(at[part["spelled"]])
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
    rules = _lines.conversion(name)
    return None if rules is None else [_rule(*rule) for rule in rules]


def _rule(kind: str, sources: Any, targets: Any, back: Any, operations: Any, offset: int) -> Rule:
    steps = tuple(Operation(name, options) for name, options in operations)
    return Rule(kind, tuple(sources), tuple(targets), (tuple(back[0]), tuple(back[1])), steps, offset)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
