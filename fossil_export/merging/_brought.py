"""What an adapter brings, by the parameters of the class it was trained in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fossil_export import models
from fossil_export.adapters import Adapter, Trained
from fossil_export.adapters._targets import Tails
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import find_matrix
from fossil_export.errors import MergeError, listed
from fossil_export.merging._guess import declared_tie, embedding_tensor, is_head
from fossil_export.merging._naming import Naming, exact_names
from fossil_export.merging._quantized import quantization
from fossil_export.models._architecture import pattern_of

REMEDY = "name the base model it was trained from with --base"


@dataclass
class Brought:
    """What an adapter brings, by parameter: tensors that were `saved` whole, modules that were `trained`, `rows` of
    tokens; what lay `below` those, where it is not the base's."""

    saved: dict[str, TensorInfo] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)
    rows: dict[str, Trained] = field(default_factory=dict)
    below: dict[str, TensorInfo] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.saved or parameter in self.trained or parameter in self.rows


def brought_by(adapter: Adapter, base: Checkpoint, naming: Naming) -> Brought:
    """What the adapter brings, by parameter. Raises MergeError for what the base's model has no parameter for."""
    brought, missing = Brought(), []
    for module, trained in adapter.trained.items():
        parameter = _parameter(trained.parameter, naming, base)
        if parameter is None:
            missing.append(module)
        elif other := brought.trained.get(parameter) or brought.rows.get(parameter):
            raise MergeError(
                f"modules {other.module} and {module} both match {parameter} in the base; "
                "name the base they were trained on with --base"
            )
        elif trained.is_rows:
            brought.rows[parameter] = trained
        else:
            brought.trained[parameter] = trained
        bias = trained.beside
        if bias is not None and (parameter := _bias(bias.parameter, naming, base)) is not None:
            brought.trained[parameter] = bias
    if missing:
        raise MergeError(_no_weights(missing, adapter, base, naming))
    for name, info in adapter.saved.items():
        parameter = _parameter(name, naming, base)
        if parameter is None:
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location}{as_class(naming)}; "
                f"{remedy(naming, base)}"
            )
        if parameter in brought.saved:
            raise MergeError(f"{adapter.path}: holds {parameter} twice, also as {info.name}; keep one")
        brought.saved[parameter] = info
        if name in adapter.below:
            brought.below[parameter] = adapter.below[name]
        elif not trained_whole(info.name, parameter.rpartition(".")[0], adapter):
            brought.below[parameter] = info  # PEFT saved the embedding as it is, since it was resized
    ends = models.bypassed(base.config or {})
    for parameter in list(brought.trained) if ends else ():
        module = parameter.rpartition(".")[0]
        if ".".join(pattern_of(module).split(".")[-2:]) in ends:
            # What was trained beside the call is no part of the live model.
            del brought.trained[parameter]
            brought.idle.append(module)
    return brought


def refuse_unsaved(adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought) -> None:
    """Raise MergeError if the config says that something was trained which the file has nothing of.

    PEFT trains, and saves, every module whose name ends so (`_set_trainable` in peft/utils/other.py).
    """
    config = adapter.config
    ends = tuple(one for one in config.get("modules_to_save") or () if one)
    tails = Tails(ends)
    root = f"{naming.part}." if naming.inner is not None else ""
    lost = [
        parameter
        for parameter in [*naming.names.whole, *naming.names.converted]
        if parameter.startswith(root) and parameter.endswith((".weight", ".bias")) and parameter not in brought.saved
        if any(map(tails.hold, _parents(parameter)))
    ]
    where = f"{adapter.path}: its config says that"
    if lost:
        raise MergeError(
            f"{where} {listed(lost)} were trained whole (modules_to_save {list(ends)}), and the adapter does not hold "
            "that; save it again, or take the name out of the config if it was not trained"
        )
    tokens = config.get("trainable_token_indices") or []
    held = {one.numbers["tokens"] for one in brought.rows.values()}
    wanted = tokens.values() if isinstance(tokens, dict) else [tokens] if tokens else []
    if any(tuple(one) not in held for one in wanted):
        raise MergeError(
            f"{where} rows of tokens were trained (trainable_token_indices), and the adapter does not hold them; save "
            "it again, or take the field out of the config if they were not"
        )


def _parents(parameter: str) -> list[str]:
    """The names of the modules that a parameter lies in."""
    parts = parameter.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def refuse_missing(
    adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought, copied: Mapping[str, str]
) -> None:
    """Raise MergeError for shards whose weights the class has and the base lacks."""
    known = {name.rpartition(".")[0] for name in base.tensors}
    missing = []
    followed = {id(trained) for parameter, trained in brought.rows.items() if parameter in naming.names}
    alone = [pair for pair in brought.rows.items() if id(pair[1]) not in followed]
    for parameter, trained in [*brought.trained.items(), *alone]:
        if parameter in naming.names or parameter in copied or parameter in brought.saved:
            continue
        if find_matrix(parameter, base.tensors, base.config) is None and parameter.rpartition(".")[0] not in known:
            missing.append(trained.module)
    if missing:
        raise MergeError(_no_weights(missing, adapter, base, naming))


def _no_weights(modules: list[str], adapter: Adapter, base: Checkpoint, naming: Naming) -> str:
    missing = f"{base.location}: has no weights for {listed(modules)}, which adapter {adapter.path} was trained on"
    if (reason := quantization(base)) is not None:
        return f"{missing}: {reason}"
    return f"{missing}{as_class(naming)}; {remedy(naming, base)}"


def _parameter(name: str, naming: Naming, base: Checkpoint) -> str | None:
    found = naming.parameter(name)
    if found is not None:
        return found
    if name in base.tensors or find_matrix(name, base.tensors, base.config) is not None:
        # A class of the model's own code has the names of its files.
        return next((one for one, stored in naming.names.whole.items() if stored == name), name)
    return None


def _bias(name: str, naming: Naming, base: Checkpoint) -> str | None:
    """The bias that changes with its weight, if there is one. The table of classes names those of every config; of one
    that the base does not hold the class itself is asked."""
    found = _parameter(name, naming, base)
    if found is None or found in naming.names or naming.model.shapes is not None:
        return found
    exact = exact_names(naming.model.name, base)
    return found if exact is None else replace(naming, names=exact).parameter(name)


def as_class(naming: Naming) -> str:
    return f" (as {naming.model.name}, which transformers makes of it)" if naming.known else ""


def remedy(naming: Naming, base: Checkpoint) -> str:
    if naming.known:
        return REMEDY
    if base.config is None:
        return f"{REMEDY} as a folder with its config.json, which tells how its tensors are named"
    return f"{REMEDY}, or install a transformers that knows this model, if its names differ"


def refuse_untold(adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought) -> None:
    """Raise MergeError for an embedding or head of a model that transformers does not know: whether they are tied, and
    how, its config may leave to its code."""
    if naming.known or declared_tie(base.config) is False:
        return
    if base.config is None:
        reason, way = "has no config.json", "name the model's folder, with its config.json, with --base"
    else:
        reason = "is a model that transformers does not know"
        way = (
            'say it in its config.json ("tie_word_embeddings": false, with both tensors stored), or install a '
            "transformers that knows the model"
        )
    vocabulary = {(part or {}).get("vocab_size") for part in (base.config, (base.config or {}).get("text_config"))}
    for name in [*brought.saved, *brought.trained, *brought.rows]:
        info = brought.saved.get(name) or base.tensors.get(name)
        rows = info.shape[0] if info is not None and info.shape else None
        if is_head(name.rpartition(".")[0]) or embedding_tensor([name]) or (rows in vocabulary and rows is not None):
            raise MergeError(
                f"{base.location}: {reason}, so whether {name}, which came with {adapter.path}, is tied to another "
                f"tensor cannot be told; {way}"
            )


def trained_whole(name: str, module: str, adapter: Adapter) -> bool:
    """Whether `module` is, or lies in, one of the config's modules_to_save."""
    return adapter.wholes.name(module) or adapter.wholes.name(name.rpartition(".")[0])
