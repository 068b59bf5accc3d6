"""What names and config alone say of heads, embeddings and ties, where the class of a model is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HEADS = ("lm_head", "embed_out", "output_layer")
EMBEDDINGS = ("embed_tokens", "shared", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def is_head(module: str) -> bool:
    """Whether a module has the name of a language model's output head."""
    return module.rpartition(".")[2] in HEADS


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
