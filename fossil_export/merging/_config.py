"""Edits of the base's config.json that the merged tensors ask for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from fossil_export.errors import MergeError

CLASSIFIERS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_ARCHITECTURE = re.compile(r"^(.*?)(?:LMHeadModel|PreTrainedModel|Model|For[A-Z]\w*)$")


def edited_config(
    config: Mapping[str, Any],
    *,
    untie: Collection[tuple[str, ...]] = (),
    vocab_size: int | None = None,
    torch_dtype: str | None = None,
    task_type: str | None = None,
    labels: int | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """`config` with what changed in the model, and nothing else, changed.

    `untie` are fields that become false, by their keys; they and `vocab_size` are set in `text_config` too where the
    base keeps them there. `labels` is the number of outputs of a classification head that came with the adapter;
    it asks for the task's class in `architectures` too, which is `architecture` if that is known.
    """
    result = copy.deepcopy(dict(config))
    text = result.get("text_config")
    parts = [result] + ([text] if isinstance(text, dict) else [])
    for keys in untie:
        _part(result, keys[:-1])[keys[-1]] = False
    if untie:
        result["tie_word_embeddings"] = False  # where loaders of other versions look
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if vocab_size is not None:
        holders = [part for part in parts if "vocab_size" in part]
        if not holders:
            raise MergeError(
                "config.json has no vocab_size, nor has its text_config, and the adapter was trained with "
                f"{vocab_size} tokens; resize the base's embeddings with transformers first, and merge into that"
            )
        for part in holders:
            part["vocab_size"] = vocab_size
    if torch_dtype is not None:
        for part in parts:
            for key in ("torch_dtype", "dtype"):
                if key in part:
                    part[key] = torch_dtype
        if not {"torch_dtype", "dtype"} & result.keys():
            result["torch_dtype"] = torch_dtype  # the older name, which every loader knows
    if architecture is not None:
        result["architectures"] = [architecture]
    elif labels is not None and task_type in CLASSIFIERS:
        names = [
            match[1] + CLASSIFIERS[task_type]
            for name in result.get("architectures") or []
            if (match := _ARCHITECTURE.match(name))
        ]
        if names:
            result["architectures"] = names
    if labels is not None and "num_labels" in result:
        result["num_labels"] = labels  # it would go before what follows
    if labels is not None and task_type != "QUESTION_ANS" and len(result.get("id2label") or {}) != labels:
        result["id2label"] = {str(index): f"LABEL_{index}" for index in range(labels)}
        result["label2id"] = {f"LABEL_{index}": index for index in range(labels)}
    return result


def _part(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for key in keys:
        part = config.get(key)
        part = part if isinstance(part, dict) else {}
        config[key] = part
        config = part
    return config


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `after` whose values are new, and None for those that are gone, for the plan and the record."""
    gone = {key: None for key in before if key not in after}
    return {key: value for key, value in after.items() if key not in before or not _same(before[key], value)} | gone


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # NaN is itself here
