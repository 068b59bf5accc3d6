"""Input embedding and output head: one tensor on disk when they are tied, two once training parted them.

PEFT trains a head of its own beside the embedding as soon as either is targeted or listed in
modules_to_save, whatever the base's config says; the merged model must then store both and say
`tie_word_embeddings: false`, or what was trained is lost on load. (PEFT's own merge adds the shard of a
targeted tied head to the embedding as well, and so does not give the model that was trained.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.errors import MergeError
from fossil_export.merging._placement import Placement

HEADS = ("lm_head", "embed_out", "output_layer")
EMBEDDINGS = ("embed_tokens", "shared", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_SCALED_WHEN_TIED = ("t5", "longt5", "switch_transformers")
_GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_head(module: str) -> bool:
    """Whether a module is a language model's output head."""
    return module.rpartition(".")[2] in HEADS


def is_tied_head(module: str, base: Checkpoint) -> bool:
    """Whether `module` is a head that `base` does not store because it is tied to the embedding."""
    return (
        is_head(module)
        and f"{module}.weight" not in base.tensors
        and embedding_tensor(base.tensors) is not None
        and declared_tie(base.config) is not False
    )


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


def part_head(adapter: Adapter, base: Checkpoint, placement: Placement, tied: bool | None) -> None:
    """Store head and embedding apart where training parted them; keep them tied where they are still equal, which
    `tied` says of those that came with the adapter."""
    embedding = embedding_tensor(base.tensors)
    if declared_tie(base.config) is False:
        return
    if embedding is None:
        changed = [name for name in [*placement.saved, *placement.trained] if is_head(name.removesuffix(".weight"))]
        if changed and declared_tie(base.config):
            raise MergeError(
                f"{base.location}: ties {changed[0]} to an embedding that cannot be told among its tensors; "
                "save the base with tie_word_embeddings=false and both tensors, then merge into that"
            )
        return
    stored = next((name for name in base.tensors if name.endswith(".weight") and is_head(name[:-7])), None)
    spoken_of = [f"{module}.weight" for module in adapter.trained if is_head(module)]
    spoken_of += [name for name in placement.added if name.endswith(".weight") and is_head(name[:-7])]
    head = stored or next(iter(spoken_of), None) or _conventional_head(embedding, adapter, base)
    if head is None or not {embedding, head} & (placement.saved.keys() | placement.trained.keys()):
        return
    comparable = head not in placement.trained and head in placement.saved and _alike(base, placement, embedding, head)
    if comparable and tied is None:
        placement.undecided = (embedding, head)
    if comparable and tied:
        if stored is None:
            del placement.saved[head]
            placement.added.remove(head)
        return
    if stored is None:
        resized = placement.vocab_size is not None and head in placement.trained and head in placement.saved
        if embedding not in placement.saved and resized:
            # The shard's base layer was the tied embedding, resized; PEFT saves it under the head's name alone.
            placement.saved[embedding] = placement.saved[head]
        if head not in placement.saved:
            placement.copied[head] = base.tensors[embedding]
        if head not in placement.added:
            placement.added.append(head)
    is_scaled = (base.config or {}).get("model_type") in _SCALED_WHEN_TIED
    # Of undecided ones this is asked again once they are known to differ.
    if is_scaled and placement.undecided is None and embedding.rpartition(".")[0].endswith("shared"):
        raise MergeError(
            f"{base.location}: scales its logits only while head and embedding are tied, which this training parted; "
            "such a model cannot be stored as a plain checkpoint"
        )
    placement.untie = True


def check_vocabulary(adapter: Adapter, base: Checkpoint, placement: Placement) -> None:
    """Raise MergeError where the vocabulary was resized and only one of embedding and head came with the adapter."""
    embedding = embedding_tensor(base.tensors)
    if placement.vocab_size is None or embedding is None:
        return
    for name in [embedding, *(name for name in base.tensors if name.endswith(".weight") and is_head(name[:-7]))]:
        rows = placement.source(name, base.tensors.get(name)).shape[0]
        if rows != placement.vocab_size:
            raise MergeError(
                f"{adapter.path}: was trained with {placement.vocab_size} tokens, but {name}, not in it, has {rows}; "
                "save the adapter with save_pretrained(..., save_embedding_layers=True)"
            )


def _conventional_head(embedding: str, adapter: Adapter, base: Checkpoint) -> str | None:
    """The head's name beside `embedding` in a generative model; None where the trained model has no such head."""
    architectures = (base.config or {}).get("architectures") or []
    generative = any(name.endswith(_GENERATIVE) for name in architectures)
    if not generative or adapter.config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return None
    prefix = "language_model." if embedding.startswith("language_model.model.") else ""
    return prefix + ("embed_out.weight" if "embed_in" in embedding else "lm_head.weight")


def _alike(base: Checkpoint, placement: Placement, embedding: str, head: str) -> bool:
    first, second = placement.saved.get(embedding) or base.tensors[embedding], placement.saved[head]
    return (first.dtype, first.shape) == (second.dtype, second.shape)


def are_equal(adapter: Adapter, base: Checkpoint, placement: Placement) -> bool | None:
    """Whether the head that is `undecided` is the embedding it would be stored beside, byte for byte; None if none is.

    Reads both, some megabytes at a time.
    """
    if placement.undecided is None:
        return None
    embedding, head = placement.undecided
    second = placement.saved[head]
    first = placement.saved.get(embedding) or base.tensors[embedding]
    size = max(1, first.nbytes // max(1, first.shape[0]))
    rows = max(1, (1 << 25) // size)
    for at in range(0, first.shape[0], rows):
        count = min(rows, first.shape[0] - at)
        if embedding in placement.saved:
            one = adapter.array(first, at, at + count).tobytes()
        else:
            one = base.home.view(first.path.name, (first.offset or 0) + at * size, count * size).tobytes()
        if one != adapter.array(second, at, at + count).tobytes():
            return False
    return True
