"""What is read off a built model of transformers: its rules, ties, parts, embedding and head."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fossil_export.models import _configs
from fossil_export.models._architecture import Operation, Rule, Tie


def submodels(model: Any, again: bool = False) -> Iterator[tuple[str, Any]]:
    """The models of transformers inside a model, itself first (""), by module name; one met twice twice, if `again`."""
    from transformers import PreTrainedModel

    for name, part in model.named_modules(remove_duplicate=not again):
        if isinstance(part, PreTrainedModel):
            yield name, part


def rules(model: Any) -> tuple[Rule, ...]:
    """transformers' conversion of this model, in order."""
    from transformers import conversion_mapping

    return tuple(map(rule, conversion_mapping.get_model_conversion_mapping(model)))


def rule(transform: Any) -> Rule:
    """One WeightTransform as data."""
    try:
        back = transform.reverse_transform()
        reverse = (tuple(back.source_patterns), tuple(back.target_patterns))
    except Exception:  # some conversions cannot be reversed
        reverse = ((), ())
    return Rule(
        kind=type(transform).__name__,
        sources=tuple(transform.source_patterns),
        targets=tuple(transform.target_patterns),
        back=reverse,
        operations=tuple(map(_operation, getattr(transform, "operations", ()))),
        offset=int(getattr(transform, "offset", 0)),
        scope=transform.scope_prefix,
        root=transform.base_model_prefix,
    )


def _operation(step: Any) -> Operation:
    return Operation(type(step).__name__, {k: _plain(v) for k, v in sorted(vars(step).items()) if _is_plain(v)})


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def places(model: Any, config: Any) -> dict[str, _configs.Path]:
    """Where in the whole config each submodel's own is, by module name.

    A class may copy its config for its parts (T5's encoder): then it is the nearest one above that has its class.
    """
    known = {id(part): path for path, part in reversed(list(_configs.nested(config)))}
    found: dict[str, _configs.Path] = {}
    for name, part in submodels(model, again=True):
        path = known.get(id(part.config))
        if path is None:
            path = _like(part.config, config, found.get(above(name, found), ()))
        found[name] = path
    return found


def above(name: str, names: Collection[str]) -> str:
    """The nearest of `names` that a name lies below; "" if none does."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return ""


def _like(part: Any, config: Any, upper: _configs.Path) -> _configs.Path:
    if type(_configs.at(config, upper)) is type(part):
        return upper
    below = ((path, other) for path, other in _configs.nested(config) if path[: len(upper)] == upper)
    same = [path for path, other in below if type(other) is type(part)]
    return same[0] if len(same) == 1 else upper


def parts(model: Any, config: Any, path: _configs.Path) -> dict[str, tuple[str, str]]:
    """The submodels with a config of their own: its key in the config, joined by dots, and the class."""
    found = places(model, config)
    kinds = dict(submodels(model))
    return {
        name: (".".join(place), type(kinds[name]).__name__)
        for name, place in found.items()
        if name in kinds and name and place != found[above(name, found)]
    }


def ties(model: Any, config: Any, content: Mapping[str, Any]) -> tuple[Tie, ...]:
    """All ties of a model and its parts, by name, also those that are off; a later one wins in transformers."""
    found: dict[str, Tie] = {}
    where = places(model, config)
    switched: dict[_configs.Path, tuple[_configs.Path, ...]] = {}
    for name, part in submodels(model, again=True):
        on, pairs = expanded(part)
        if not pairs:
            continue
        path = where[name]
        if path not in switched:
            switched[path] = _configs.switches(content, path)
        first, *others = switched[path] or ((),)
        for target, source in pairs.items():
            tie = Tie(_join(name, target), _join(name, source), on, first, tuple(others))
            if tie.on or tie.target not in found:
                found[tie.target] = tie
    return tuple(found[target] for target in sorted(found))


def expanded(part: Any) -> tuple[bool, dict[str, str]]:
    """Whether a submodel ties now, and its own ties by name as they are if it does."""
    if not getattr(part, "_tied_weights_keys", None):
        return False, {}
    before = getattr(part.config, _configs.TIE, None)
    part.config.tie_word_embeddings = True
    try:
        pairs = dict(part.get_expanded_tied_weights_keys(all_submodels=False))
    except ValueError:  # its patterns fit nothing in this config
        pairs = {}
    finally:
        part.config.tie_word_embeddings = before
    return bool(before), pairs


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def module(model: Any, method: str) -> str | None:
    """The name of the module that a method of the model gives."""
    try:
        wanted = getattr(model, method)()
    except Exception:  # NotImplementedError, and AttributeError in classes without one
        return None
    return next((name for name, part in model.named_modules() if part is wanted), None) if wanted is not None else None


def reads_tie(model: Any) -> bool:
    """Whether the forward of any of its modules reads `tie_word_embeddings`."""
    kinds = {type(part) for part in model.modules() if type(part).__module__.startswith("transformers.")}
    return any(_configs.TIE in _names(inspect.unwrap(kind.forward)) for kind in kinds)


def _names(function: Any) -> Iterator[str]:
    todo = [getattr(function, "__code__", None)]
    while todo:
        code = todo.pop()
        if code is not None:
            yield from code.co_names
            todo += [value for value in code.co_consts if inspect.iscode(value)]


def ignored(model: Any) -> tuple[str, ...]:
    """Patterns of names in files that transformers passes over, with the two that it adds for old files."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return tuple(sorted(patterns))
