"""What the table is made of: every model class of transformers, built with its default config and some others.

A record is a class for one model type. Its `names` are those of its own modules; a model inside it is only named, with
its class and where its config is, so that the table can put another one in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fossil_export.models import _configs, _defaults, _traits, _transformers, _variants
from fossil_export.models._architecture import pattern_of

# Parameters of a class's variants, all together: for large models fewer of these are built.
_BUILT, _LEAST = 6000, 8


@dataclass(frozen=True)
class Inner:
    """A model inside another: its class, the key of its config in the other's, its model type; and the value that one
    key of the other's config must have so that it is there, if it is not by default."""

    kind: str
    key: str
    model_type: str
    when: tuple[str, Any] | None = None


@dataclass
class Record:
    """A class for one model type, as seen in all models that were built."""

    names: set[str] = field(default_factory=set)
    usual: set[str] = field(default_factory=set)  # all names below it, with default configs
    inside: dict[str, Inner] = field(default_factory=dict)  # by module
    below: dict[str, set[str]] = field(default_factory=dict)  # module -> the names there, with default configs
    whole: bool = False  # it was built by itself
    tree: dict[str, tuple[str, str]] = field(default_factory=dict)  # all modules below with a model -> class, type
    ties: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Survey:
    """What was seen: the records, and for each model type its ties' places, its classes elsewhere, its oddities."""

    records: dict[tuple[str, str], Record] = field(default_factory=dict)
    ties: dict[str, dict[str, Any]] = field(default_factory=dict)
    of: dict[str, dict[str, str]] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)
    spelled: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def model_classes(config: Any, autos: Collection[str]) -> dict[str, Any]:
    """The model classes of transformers for a config, by name: those beside it, and those of the auto classes."""
    import transformers

    package = sys.modules[type(config).__module__.rpartition(".")[0]]
    found: dict[str, Any] = {}
    for name in sorted({*dir(package), *autos}):
        if name[0].isupper() and not name.endswith("PreTrainedModel"):
            try:
                kind: Any = getattr(transformers, name, None)
            except Exception:  # it needs a package that is not here
                continue
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                found[name] = kind
    return {name: kind for name, kind in found.items() if name in autos or kind.config_class is type(config)}


def survey(model_type: str, into: Survey) -> None:
    """Add what the classes of one model type are. A class that cannot be built is left out, with the reason."""
    content = _defaults.content(model_type)
    try:
        config = _configs.make(content)
    except Exception as problem:
        into.left_out[model_type] = _reason(problem)
        return
    autos = _transformers.classes(model_type)
    kinds = model_classes(config, set(autos.values()))
    before = len(into.records)
    for name in kinds:
        try:
            config = _configs.make(content)  # anew, for some classes change it
            path = _transformers.place(config, kinds[name])
            model = _transformers.build(kinds[name], _configs.at(config, path))
            _add(model, config, content, path, into)
        except Exception as problem:
            into.left_out[f"{model_type} {name}"] = _reason(problem)
            continue
        if path:
            into.of.setdefault(model_type, {})[name] = ".".join(path)
        else:
            whole = name == autos.get("AutoModel") or "AutoModel" not in autos
            config = _configs.make(content)
            if _variants.of(config, kinds[name], whole):
                small, less, count = _smaller(kinds[name], model, config, content)
                variants = _variants.of(less, kinds[name], whole)[: max(_LEAST, _BUILT // (1 + count))]
                if changes := _defaults.other(model_type):
                    variants.append(_variants.Variant((), changes))
                for variant in variants:
                    _add_variant(kinds[name], small, variant, into)
    if len(into.records) > before:
        if _configs.changes_more(content):
            into.scales.add(model_type)
        if spelled := _configs.spelling(content):
            into.spelled[model_type] = spelled


def _smaller(kind: Any, model: Any, config: Any, content: Mapping[str, Any]) -> tuple[dict[str, Any], Any, int]:
    """A content and a config with fewer layers, if the class has the same names then, and how many it has."""
    small = dict(content)
    for path, part in _configs.nested(config):
        if len(path) < 2:
            fewer = {k: 4 for k, value in vars(part).items() if "layers" in k and type(value) is int and value > 4}
            if path:  # written out, for a key alone would make another one
                small[path[0]] = {**_configs.cleaned(part.to_dict()), **fewer}
            else:
                small |= fewer
    found = model.state_dict()
    try:
        less = _configs.make(small)
        other = _transformers.build(kind, less).state_dict()
    except Exception:
        return dict(content), config, len(found)
    if set(map(pattern_of, other)) != set(map(pattern_of, found)):
        return dict(content), config, len(found)
    return small, less, len(other)


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"


def _type(config: Any) -> str:
    return str(config.model_type or type(config).__name__)


def _add_variant(kind: Any, content: Mapping[str, Any], variant: _variants.Variant, into: Survey) -> None:
    path, value = variant.path, variant.value
    content = _configs.with_key(content, path, value) if path else {**content, **value}
    try:
        config = _configs.make(content)
        model = _transformers.build(kind, config)
        _add(model, config, content, (), into, variant)
    except Exception:  # values that do not go together
        return


def _add(
    model: Any,
    config: Any,
    content: Mapping[str, Any],
    path: _configs.Path,
    into: Survey,
    variant: _variants.Variant | None = None,
) -> None:
    usual = variant is None
    places = _traits.places(model, config)
    models = dict(_traits.submodels(model))
    above = {name: _traits.above(name, models) for name in models}
    records = {name: _record(part, into) for name, part in models.items()}
    for name in list(model.state_dict()):
        home = _traits.above(name, models)
        records[home].names.add(pattern_of(_below(name, home)))
        while usual:
            records[home].usual.add(pattern_of(_below(name, home)))
            if not home:
                break
            upper = above[home]
            records[upper].below.setdefault(_below(home, upper), set()).add(pattern_of(_below(name, home)))
            home = upper
    records[""].whole |= usual
    if usual and not records[""].tree:
        records[""].tree = {name: (type(part).__name__, _type(part.config)) for name, part in models.items() if name}
    for name, part in models.items():
        if name:
            upper = above[name]
            when = None
            if variant is not None and variant.path[: len(places[upper])] == places[upper] != variant.path:
                when = ".".join(variant.path[len(places[upper]) :]), variant.value
            entry = Inner(type(part).__name__, _key(places, name, upper, models), _type(part.config), when)
            records[upper].inside.setdefault(_below(name, upper), entry)
        pairs, numbered = _tied(part)
        if usual or not numbered:  # those with numbers are of one config
            for target, source in pairs.items():
                records[name].ties.setdefault(target, source)
        if pairs and usual:
            _add_switch(content, config, places[name], into)
        if "prefix" not in records[name].facts:
            records[name].facts = _facts(part)


def _record(part: Any, into: Survey) -> Record:
    return into.records.setdefault((_type(part.config), type(part).__name__), Record())


def _below(name: str, module: str) -> str:
    return name[len(module) + 1 :] if module else name


def _key(places: Mapping[str, _configs.Path], name: str, upper: str, models: Mapping[str, Any]) -> str:
    """The config of a model inside another: "" the same, a key in it, or `=` and a model type if it is in neither."""
    mine, theirs = places[name], places[upper]
    if mine == theirs and type(models[name].config) is type(models[upper].config):
        return ""
    if len(mine) > len(theirs) and mine[: len(theirs)] == theirs:
        return ".".join(mine[len(theirs) :])
    return "=" + _type(models[name].config)


def _tied(part: Any) -> tuple[dict[str, str], bool]:
    """A class's own ties: by name, or as its patterns if they have numbers in them; and whether they have."""
    _, pairs = _traits.expanded(part)
    numbered = any(pattern_of(name) != name for pair in pairs.items() for name in pair)
    return (dict(part._tied_weights_keys) if numbered else pairs), numbered


def _add_switch(content: Mapping[str, Any], config: Any, path: _configs.Path, into: Survey) -> None:
    known = into.ties.setdefault(str(content["model_type"]), {})
    if ".".join(path) not in known:
        keys = [
            [".".join(key), bool(getattr(_configs.at(config, key[:-1]), key[-1], False))]
            for key in _configs.switches(content, path)
        ]
        known[".".join(path)] = [bool(getattr(_configs.at(config, path), _configs.TIE, False)), *keys]


def _facts(part: Any) -> dict[str, Any]:
    prefix = part.base_model_prefix
    return {
        "prefix": prefix,
        "bare": not (prefix and hasattr(part, prefix)),
        "embedding": _traits.module(part, "get_input_embeddings"),
        "head": _traits.module(part, "get_output_embeddings"),
        "follows": _traits.reads_tie(part),
        "ignored": _traits.ignored(part),
        "optional": tuple(sorted(part._keys_to_ignore_on_load_missing or ())),
    }


def merge(surveys: Mapping[str, Survey]) -> Survey:
    """One survey of several, which are by model type.

    What a type's own survey saw of a class is kept, whatever others made of it; else what was seen first is kept.
    """
    found = Survey()
    for model_type, one in sorted(surveys.items()):
        for key, record in one.records.items():
            if not record.facts:
                continue
            own = key in surveys[key[0]].records if key[0] in surveys else False
            if key[0] == model_type or not own:
                mine = found.records.setdefault(key, Record(facts=record.facts))
                _unite(mine, record)
        found.ties.update(one.ties)
        found.of.update(one.of)
        found.scales |= one.scales
        found.spelled.update(one.spelled)
        found.left_out.update(one.left_out)
    for record in found.records.values():
        record.inside = {
            at: inner for at, inner in record.inside.items() if (inner.model_type, inner.kind) in found.records
        }
    return found


def _unite(mine: Record, other: Record) -> None:
    mine.names |= other.names
    mine.usual |= other.usual
    mine.inside = {**mine.inside, **{at: inner for at, inner in other.inside.items() if at not in mine.inside}}
    mine.ties = {**other.ties, **mine.ties}
    mine.tree = mine.tree or other.tree
    mine.whole |= other.whole
    for module, names in other.below.items():
        mine.below.setdefault(module, set()).update(names)
