"""Tensors whose rows are tokens or labels, which training may have more or fewer of."""

from __future__ import annotations

from fossil_export import models
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import MergeError
from fossil_export.merging._brought import trained_whole
from fossil_export.merging._config import CLASSIFIERS, edited_config
from fossil_export.merging._guess import embedding_tensor, is_head
from fossil_export.merging._naming import Naming
from fossil_export.merging._placement import Placement

_LABEL_LAYERS = ("score", "classifier", "out_proj", "qa_outputs", "logits_proj", "linear_out")


def is_vocabulary(parameter: str, naming: Naming, base: Checkpoint) -> bool:
    """Whether the rows of a parameter are the tokens of the vocabulary."""
    module = parameter.rpartition(".")[0]
    if not naming.known:
        return is_head(module) or parameter == embedding_tensor(base.tensors)
    own = (naming.model.embedding, naming.model.head)
    if module in own:
        return True
    # Detection models and Zamba tie other things too.
    pairs = ((tie.target, tie.source) for tie in naming.model.ties)
    return any(parameter in pair and any(one.rpartition(".")[0] in own for one in pair) for pair in pairs)


def vocabulary_rows(parameter: str, base: Checkpoint, naming: Naming) -> int | None:
    """The rows that the base has of a parameter which it does not store: those of what it is tied to, or of the input
    embedding."""
    pairs = [(tie.target, tie.source) for tie in naming.model.ties]
    near = [*(one for pair in pairs if parameter in pair for one in pair), f"{naming.model.embedding}.weight"]
    names = [naming.names.whole.get(one) for one in near]
    if not naming.known:
        names.append(embedding_tensor(base.tensors))
    return next((base.tensors[name].shape[0] for name in names if name is not None and base.tensors[name].shape), None)


def check_vocabulary(adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement) -> None:
    """Raise MergeError where the vocabulary was resized and only one of embedding and head came with the adapter."""
    if placement.vocab_size is None:
        return
    modules = [module for module in (naming.model.embedding, naming.model.head) if module is not None]
    names = [naming.names.whole.get(f"{module}.{last}") for module in modules for last in ("weight", "bias")]
    names += [naming.names.whole.get(name) for tie in naming.model.ties for name in (tie.target, tie.source)]
    if not naming.known:
        names = [name for name in base.tensors if name.endswith(".weight") and is_head(name[:-7])]
        names.append(embedding_tensor(base.tensors))
    for parameter, stored in naming.names.whole.items():
        if _is_bias_of_tokens(parameter) and base.tensors[stored].shape[-1:] != (placement.vocab_size,):
            raise MergeError(
                f"{adapter.path}: was trained with {placement.vocab_size} tokens, but {stored}, not in it, has "
                f"{base.tensors[stored].shape[-1]}; resize the base's embeddings with transformers first "
                f"(resize_token_embeddings({placement.vocab_size})), save it, and merge into that"
            )
    for name in [*names, *placement.copied]:
        if name is None:
            continue
        rows = placement.source(name, base.tensors.get(name)).shape[0]
        if rows != placement.vocab_size:
            raise MergeError(
                f"{adapter.path}: was trained with {placement.vocab_size} tokens, but {name}, not in it, has {rows}; "
                "save the adapter with save_pretrained(..., save_embedding_layers=True)"
            )


def _is_bias_of_tokens(parameter: str) -> bool:
    """BART's family adds it to the logits. It is a buffer, which PEFT never saves."""
    return parameter.rpartition(".")[2] == "final_logits_bias"


def is_classifier(parameter: str, info: TensorInfo, adapter: Adapter, base: Checkpoint, naming: Naming) -> bool:
    """Whether a parameter is the last layer of a classification head, whose outputs are the labels: by the task and the
    layer's name or, where these do not tell, by what the installed transformers makes of a config with so many labels.
    """
    module, _, last = parameter.rpartition(".")
    if last != "weight" or not info.shape:
        return False
    classifies = adapter.config.get("task_type") in CLASSIFIERS or naming.model.name.endswith("Classification")
    if classifies and module.rpartition(".")[2] in _LABEL_LAYERS:
        return True
    if not naming.known or not trained_whole(info.name, module, adapter):
        return False
    config, name = base.config or {}, naming.model.name
    now, then = (
        models.architecture(one, name, exact=True)
        for one in (config, edited_config(config, task_type=adapter.config.get("task_type"), labels=info.shape[0]))
    )
    shapes = [(found.shapes or {}).get(parameter) for found in (now, then) if found is not None]
    return len(shapes) == 2 and shapes[0] != info.shape == shapes[1]
