"""Configs of transformers, made from a config.json's content, and which of its keys ties the embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from fossil_export._libraries import config_class

TIE = "tie_word_embeddings"
_SPELLINGS = ("tie_embedding",)

Path = tuple[str, ...]

# Keys that name code, kernels of the Hub, or weights to be fetched beside the model's own.
_FOREIGN = (
    "auto_map custom_pipelines use_kernels kernel_config use_pretrained_backbone quantization_config _name_or_path "
    "name_or_path attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
    "_experts_implementation _experts_implementation_internal device_map torch_dtype dtype"
)
_NAMES = frozenset(_FOREIGN.split())
# The largest whole number by what its key says: of layers, of other things that are made one by one, of anything.
_LAYERS = re.compile("(layer|depth|block|stage|stack|level)s?$")
_COUNTED = ("expert", "head", "label", "num_")
_DEEP, _MOST, _FAR = 2_000, 100_000, 20_000_000
_UNCOUNTED = ("theta", "token", "pixel", "base", "seed", "sample", "vocab", "size", "freq")
_UNBOUNDED = ("theta", "base", "seed", "freq")  # no loop goes so far
_DEEPEST = 12


class Strange(ValueError):
    """A config that no model is made of."""


def cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json's content without the keys that name code. Raises Strange for absurd values."""
    copy = _clean(config, 0)
    assert isinstance(copy, dict)
    return copy


def _clean(value: Any, depth: int, key: str = "") -> Any:
    if depth > _DEEPEST:
        raise Strange("nested too deep")
    if isinstance(value, Mapping):
        if len(value) > _MOST:
            raise Strange(f"{key} has {len(value)} entries")
        return {str(k): _clean(v, depth + 1, str(k)) for k, v in value.items() if k not in _NAMES}
    if isinstance(value, (list, tuple)):
        if len(value) > _MOST:
            raise Strange(f"{key} has {len(value)} entries")
        return [_clean(v, depth + 1, key) for v in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _most(key):
        raise Strange(f"{key} is {value}")
    return value


def _most(key: str) -> float:
    if any(word in key for word in _UNCOUNTED):
        return math.inf if any(word in key for word in _UNBOUNDED) else _FAR
    if _LAYERS.search(key):
        return _DEEP
    return _MOST if any(word in key for word in _COUNTED) else _FAR


def make(content: Mapping[str, Any]) -> Any:
    """The config of transformers for a config.json's (cleaned) content. Raises Strange, or what transformers does."""
    from transformers import CONFIG_MAPPING

    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise Strange("model_type is none of transformers'")
    return CONFIG_MAPPING[kind].from_dict(deepcopy(dict(content)))


def nested(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """A config and those inside it, with the path of keys of each, the outermost first."""
    yield path, config
    if len(path) < _DEEPEST:
        for key, value in vars(config).items():
            if isinstance(value, config_class()):
                yield from nested(value, (*path, key))


def at(config: Any, path: Path) -> Any:
    """The config at a path of keys."""
    for key in path:
        config = getattr(config, key)
    return config


def with_key(content: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of a config.json's content with a value put at a path of keys."""
    copy: dict[str, Any] = dict(content)
    if len(path) == 1:
        copy[path[0]] = value
    else:
        inner = copy.get(path[0])
        copy[path[0]] = with_key(inner if isinstance(inner, Mapping) else {}, path[1:], value)
    return copy


def switches(content: Mapping[str, Any], path: Path) -> tuple[Path, ...]:
    """The keys of a config.json that must all be false so that the config at `path` does not tie; () if none do.

    Found by making the config again. Its own key comes first.
    """
    config = make(content)
    own = (*path, TIE)
    keys = []
    for where, part in nested(config):
        given = _inside(content, where)
        if given is None:  # a part by default: written out, for a key alone would make another one
            content = with_key(content, where, cleaned(part.to_dict()))
        keys += [(*where, key) for key in sorted(_ties_of(part) | _given_ties(given or {}))]
    keys = [
        own,
        *sorted(key for key in keys if key != own and key[-1] == TIE),
        *sorted(k for k in keys if k[-1] != TIE),
    ]
    every = _all(content, keys, True)
    if not _ties(_all(every, keys, False), path):
        needed = list(keys)
        for key in reversed(keys):
            fewer = [k for k in needed if k != key]
            if not _ties(_all(every, fewer, False), path):
                needed = fewer
        return tuple(needed)
    return ()


def spelling(content: Mapping[str, Any]) -> str | None:
    """Another key of a config.json that means `tie_word_embeddings`, and that wins over it; None if there is none."""
    for key in _SPELLINGS:
        try:
            if all(_ties({**content, TIE: not value, key: value}, ()) is value for value in (True, False)):
                return key
        except Exception:  # a config class may refuse what it does not know
            continue
    return None


def _inside(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    for key in path:
        inner = content.get(key)
        if not isinstance(inner, Mapping):
            return None
        content = inner
    return content


def _ties_of(config: Any) -> set[str]:
    return {TIE} | _given_ties(vars(config))


def _given_ties(content: Mapping[str, Any]) -> set[str]:
    return {key for key, value in content.items() if key.startswith("tie_") and _flag(value)}


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _all(content: Mapping[str, Any], keys: list[Path], value: bool) -> dict[str, Any]:
    made = dict(content)
    for key in keys:
        made = with_key(made, key, value)
    return made


def _ties(content: Mapping[str, Any], path: Path) -> bool:
    try:
        return bool(getattr(at(make(content), path), TIE, False))
    except Exception:  # a config class may refuse a value; then that is no way to switch it off
        return True


def changes_more(content: Mapping[str, Any]) -> bool:
    """Whether another value of `tie_word_embeddings` changes anything else in the config (T5's scale of outputs)."""
    seen = []
    for value in (True, False):
        try:
            seen.append(_without(make({**content, TIE: value}).to_dict()))
        except Exception:  # a class that refuses one of the two cannot compute in two ways
            return False
    return bool(seen[0] != seen[1])


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if not str(k).startswith("tie_")}
    return [_without(v) for v in value] if isinstance(value, list) else value
