"""Which fields of a merged model's config.json make another model than the one that a merge would write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, FLOATS
from fossil_export.merging._config import difference
from fossil_export.models import made_alike

_NUMBER = (int, float)
# What may differ: it says where the files come from or how text is generated, not what the weights compute. Each is of
# these types, for transformers refuses others.
_FREE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("_name_or_path", "name_or_path", "transformers_version"), (str,)),
    **dict.fromkeys(("use_cache", "do_sample", "early_stopping", "output_scores", "return_dict"), (bool,)),
    **dict.fromkeys(("max_length", "min_length", "max_new_tokens", "num_beams", "no_repeat_ngram_size"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), _NUMBER),
    "top_k": (int,),
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES, _TIE = ("dtype", "torch_dtype"), "tie_word_embeddings"
# Loaders go by these themselves.
_ALWAYS = {"architectures", "auto_map", "model_type", "quantization_config"}


def changed_fields(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The fields of `config` that are not as `wanted`: all but those known to be free, and ties, which are looked at on
    their own.

    A field that one of the two leaves out may have its default there, or another spelling: if the installed
    transformers makes equal configs of both, nothing has changed.
    """
    changed = list(_changed(config, wanted))
    odd = _ALWAYS | {*_TOKENS, *_FREE, *_DTYPES, _TIE}  # of these, such a value is no default
    if changed and not odd & {*changed} and made_alike(config, wanted, {*_FREE, *_TOKENS, *_DTYPES, _TIE}):
        return []
    return changed


def _changed(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for key in difference(config, wanted):
        own, other = config.get(key), wanted.get(key)
        if key.endswith("_config") and isinstance(own, Mapping) and isinstance(other, Mapping):
            yield from (f"{key}.{inner}" for inner in _changed(own, other))
        elif key not in config:
            if key not in (*_FREE, *_TOKENS, *_DTYPES, _TIE):
                yield key
        elif not _may_be(key, own, config, wanted):
            yield key


def _may_be(key: str, value: Any, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if key == _TIE:
        return isinstance(value, bool)
    if key in _DTYPES:
        return BY_TORCH_NAME.get(value if isinstance(value, str) else "") in FLOATS
    if key in _TOKENS:
        classifies = any("SequenceClassification" in str(name) for name in wanted.get("architectures") or ())
        if key == "pad_token_id" and classifies:  # it says which token is the last
            return False
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        return all(_is_token(one, config.get("vocab_size")) for one in ids)
    kinds = _FREE.get(key, ())
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_token(value: Any, count: Any) -> bool:
    if value is None:
        return True
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and 0 <= value < (count if isinstance(count, int) else math.inf)
