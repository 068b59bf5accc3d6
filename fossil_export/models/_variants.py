"""Other values of a config's fields that may give a class other parameters: found by reading its source."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fossil_export.models import _configs

_FIELD = r"\b(?:config|self|cfg|text_config|vision_config)\.(\w+)"
_TESTED = re.compile(r"\bif\b|\belse\b|[!=<>]=|bias\s*=|\bin\b|\bnot\b|getattr|\[")
_COMPARED = re.compile(_FIELD + r"\s*(?:==|!=|in)\s*[\[(]?((?:\s*\"[\w.+-]+\",?)+)")
_HELD = re.compile(r"(\"[\w.+-]+\") in " + _FIELD)
# Not what a model is made of, or what would make it huge.
_SKIPPED = (
    "output_attentions output_hidden_states return_dict use_cache gradient_checkpointing tie_word_embeddings "
    "vocab_size max_position_embeddings pad_token_id hidden_size num_hidden_layers torchscript problem_type "
    "num_attention_heads chunk_size_feed_forward initializer_range use_return_dict "
    "num_labels id2label label2id classifier_dropout classifier_activation"
)
# Words in the keys of lists that say which layers are another kind.
_INDEXES = ("layer", "idx", "ind")
# Values that are taken apart in code, so that no comparison names them.
_KNOWN = {"feed_forward_proj": ("relu", "gated-gelu")}


@dataclass(frozen=True)
class Variant:
    """Another value for the field of a config at a path of keys; without a path, values of several."""

    path: _configs.Path
    value: Any


def of(config: Any, kind: Any, whole: bool) -> list[Variant]:
    """Other values for one field of a config each; for all fields, or for those that the class's own source tests.

    Those that are likely to count come first.
    """
    module = sys.modules[kind.__module__]
    source = _source(module) if whole else _source(kind)
    if whole:
        source += _source(sys.modules[type(config).__module__])
    package = kind.__module__.rpartition(".")[0]
    found: list[tuple[int, int, Variant]] = []
    for path, part in _configs.nested(config):
        if len(path) > 1 or (path and not (whole and type(part).__module__.startswith(package))):
            continue
        for likely, name, value in _values(part, source, whole):
            found.append((likely, len(found), Variant((*path, name), value)))
    return [variant for *_, variant in sorted(found, key=lambda one: one[:2])]


def _values(config: Any, source: str, whole: bool) -> Iterator[tuple[int, str, Any]]:
    """Fields and other values for them, with a number that is small if they are likely to count."""
    named, tested, compared = _fields(source)
    for name in sorted(_asked(source) - vars(config).keys() - set(_SKIPPED.split())):
        yield from ((1, name, other) for other in (*compared.get(name, ()), 3) if whole)
    for name, value in sorted(vars(config).items()):
        if name.startswith("_") or name in _SKIPPED.split() or name not in named:
            continue
        for other in _KNOWN.get(name, ()):
            yield 0, name, other
        if any(word in name for word in _INDEXES) and (value is None or isinstance(value, list)) and name in tested:
            yield from ((1, name, other) for other in ([0, 1], [0], []) if other != value and _indexes(value))
        if isinstance(value, bool):
            yield 0, name, not value
        elif isinstance(value, str):
            yield from ((1, name, other) for other in compared.get(name, ()) if other != value)
        elif name not in tested or not whole:
            continue
        elif isinstance(value, int):
            yield from ((2, name, other) for other in (None, 0 if value else 1) if other != value)
            yield 3, name, value // 2
        elif value is None:
            yield from ((2, name, other) for other in (16, True, *compared.get(name, ())))
        elif isinstance(value, list) and value and isinstance(value[0], str):
            others = sorted({*value, *(word for word in _layer_types() if f'"{word}"' in source)})
            yield from ((1, name, [other] * len(value)) for other in others)


def _indexes(value: Any) -> bool:
    return value is None or all(type(item) is int for item in value)


@cache
def _layer_types() -> tuple[str, ...]:
    from transformers import configuration_utils

    return tuple(sorted(configuration_utils.ALLOWED_LAYER_TYPES))


@cache
def _fields(source: str) -> tuple[frozenset[str], frozenset[str], dict[str, tuple[str, ...]]]:
    named = frozenset(re.findall(_FIELD, source)) | frozenset(re.findall(r"getattr\(\w*config, \"(\w+)\"", source))
    tested: set[str] = set()
    for row in source.splitlines():
        if _TESTED.search(row):
            tested |= set(re.findall(_FIELD, row)) | set(re.findall(r"getattr\(\w*config, \"(\w+)\"", row))
    compared: dict[str, tuple[str, ...]] = {}
    for name, values in (*_COMPARED.findall(source), *((name, word) for word, name in _HELD.findall(source))):
        compared[name] = tuple(sorted({*compared.get(name, ()), *re.findall(r'"([^"]+)"', values)}))
    return named, frozenset(tested), compared


@cache
def _asked(source: str) -> frozenset[str]:
    """Fields that a config may lack."""
    return frozenset(re.findall(r"getattr\(\w*config, \"([a-z]\w+)\"", source))


@cache
def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
