"""What the table is made of: every model class of transformers, built with its default config and some others.

A record is a class for one model type. Its `names` are those of its own modules; a model inside it is only named, with
its class and where its config is, so that the table can put another one in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fossil_export.models import _configs, _traits, _transformers, _variants
from fossil_export.models._architecture import pattern_of

# Parameters of a class's variants, all together: for large models fewer of these are built.
_BUILT = 3000


@dataclass
class Record:
    """A class for one model type, as seen in all models that were built."""

    names: set[str] = field(default_factory=set)
    usual: set[str] = field(default_factory=set)  # all names below it, with default configs
    inside: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # module -> class, key of config, its type
    below: dict[str, set[str]] = field(default_factory=dict)  # module -> the names there, with default configs
    ties: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Survey:
    """What was seen: the records, and for each model type its ties' places, its classes elsewhere, its oddities."""

    records: dict[tuple[str, str], Record] = field(default_factory=dict)
    ties: dict[str, dict[str, Any]] = field(default_factory=dict)
    of: dict[str, dict[str, str]] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)
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
    content = {"model_type": model_type}
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
            variants = _variants.of(config, kinds[name], whole)[: max(4, _BUILT // (1 + len(model.state_dict())))]
            small = _smaller(kinds[name], model, config, content) if variants else {}
            for other in variants:
                _add_variant(kinds[name], {**content, **small, **other}, into)
    if len(into.records) > before and _configs.changes_more(content):
        into.scales.add(model_type)


def _smaller(kind: Any, model: Any, config: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer layers, if the class has the same names then."""
    small = {key: 4 for key, value in vars(config).items() if "layers" in key and type(value) is int and value > 4}
    try:
        other = _transformers.build(kind, _configs.make({**content, **small}))
    except Exception:
        return {}
    return small if set(map(pattern_of, other.state_dict())) == set(map(pattern_of, model.state_dict())) else {}


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"


def _type(config: Any) -> str:
    return str(config.model_type or type(config).__name__)


def _add_variant(kind: Any, content: Mapping[str, Any], into: Survey) -> None:
    try:
        config = _configs.make(content)
        model = _transformers.build(kind, config)
        _add(model, config, content, (), into, usual=False)
    except Exception:  # values that do not go together
        return


def _add(
    model: Any, config: Any, content: Mapping[str, Any], path: _configs.Path, into: Survey, usual: bool = True
) -> None:
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
    for name, part in models.items():
        if name:
            upper = above[name]
            entry = (type(part).__name__, _key(places, name, upper, models), _type(part.config))
            records[upper].inside.setdefault(_below(name, upper), entry)
        pairs = _tied(part)
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


def _tied(part: Any) -> dict[str, str]:
    """A class's own ties: by name, or as its patterns if they have numbers in them."""
    _, pairs = _traits.expanded(part)
    numbered = any(pattern_of(name) != name for pair in pairs.items() for name in pair)
    return dict(part._tied_weights_keys) if numbered else pairs


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


def merge(surveys: Iterable[Survey]) -> Survey:
    """One survey of several, in their order; of what was seen in more than one, the first is kept."""
    found = Survey()
    for other in surveys:
        for key, record in other.records.items():
            mine = found.records.setdefault(key, Record())
            mine.names |= record.names
            mine.usual |= record.usual
            mine.inside = {**record.inside, **mine.inside}
            mine.ties = {**record.ties, **mine.ties}
            mine.facts = mine.facts or record.facts
            for module, names in record.below.items():
                mine.below.setdefault(module, set()).update(names)
        found.ties.update(other.ties)
        found.of.update(other.of)
        found.scales |= other.scales
        found.left_out.update(other.left_out)
    found.records = {key: record for key, record in found.records.items() if record.facts}
    for record in found.records.values():
        record.inside = {at: one for at, one in record.inside.items() if (one[2], one[0]) in found.records}
    return found
