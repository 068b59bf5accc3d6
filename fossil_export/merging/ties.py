"""Input embedding and output head: one tensor on disk when they are tied, two once training parted them.

PEFT trains a head of its own beside the embedding as soon as either is targeted or listed in
modules_to_save, whatever the base's config says; the merged model must then store both and say
`tie_word_embeddings: false`, or the trained head is lost on load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HEADS = ("lm_head", "embed_out", "output_layer")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def head_module(modules: Iterable[str]) -> str | None:
    """The output head among `modules`."""
    return next((module for module in modules if module.rpartition(".")[2] in HEADS), None)


def embedding_tensor(names: Iterable[str]) -> str | None:
    """The input embedding's weight among tensor `names`; None when there is none or it is not clear which."""
    found = [name for name in names if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def declared_tie(config: Mapping[str, Any] | None) -> bool | None:
    """`tie_word_embeddings` of a config or its text part; None when it leaves that to the model's default."""
    for part in (config or {}, (config or {}).get("text_config") or {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
