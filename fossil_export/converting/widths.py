"""How wide each trained layer is: from the headers of the base's weights, or from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints.jsonfile import read_json
from fossil_export.converting.options import Options
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging.match import match_names
from fossil_export.storage import resolve

Shapes = dict[str, tuple[int, int]]


_PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite",
)  # fmt: skip
# Families all of whose layers have the sizes that the config names.


def layer_shapes(adapter: Adapter, options: Options) -> tuple[Shapes, frozenset[str]]:
    """(out, in) of each trained module, and the names of all modules of the base with a matrix (empty if unknown).

    Reads headers only. Raises MergeError where a shard does not fit,
    CheckpointError without base and config.
    """
    if options.base_config is not None:
        path = resolve(options.base_config, CheckpointError, "base config")
        config = read_json(path / "config.json" if path.is_dir() else path, CheckpointError)
        return _by_config(adapter, config, path), frozenset()
    assert options.base is not None
    base = options.base.checkpoint()
    where, tensors = options.base.name, {tensor: info.shape for tensor, info in base.tensors.items()}
    matrices = {
        tensor.removesuffix(".weight"): shape
        for tensor, shape in tensors.items()
        if tensor.endswith(".weight") and len(shape) == 2
    }

    def fits(module: str, candidate: str) -> bool:
        trained = adapter.trained[module]
        return trained.mismatch(matrices[candidate]) is None

    tied = _tied(adapter, matrices)
    names = match_names([module for module in adapter.trained if module not in tied], matrices, fits)
    embedding = next((shape for module, shape in matrices.items() if module.endswith(("embed_tokens", "wte"))), None)
    found: Shapes = {}
    for module, trained in adapter.trained.items():
        shape = matrices.get(names.get(module, module), embedding if module in tied else None)
        if shape is None:
            raise MergeError(
                f"{where}: has no weights for {module}, which {adapter.path} was trained on; name the base "
                "it was trained from with --base"
            )
        if reason := trained.mismatch((shape[0], shape[1])):
            raise MergeError(f"{where}: {module} {list(shape)} does not fit its shard: {reason}")
        found[module] = (shape[0], shape[1])
    renamed = {name: module for module, name in names.items()}
    return found, frozenset(renamed.get(module, module) for module in matrices)


def _tied(adapter: Adapter, matrices: Mapping[str, Any]) -> set[str]:
    """Heads that the base does not store because they are its embedding."""
    return {module for module in adapter.trained if module.endswith("lm_head") and module not in matrices}


def _by_config(adapter: Adapter, config: Mapping[str, Any], path: Path) -> Shapes:
    """By the names that Llama and its kin give their layers."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    kind = text.get("model_type")
    if kind not in _PLAIN or any("experts" in module or "vision" in module for module in adapter.trained):
        raise CheckpointError(
            f"{path}: is of type {kind!r}, whose layers' sizes a config alone does not tell; name the model with --base"
        )
    keys_of_sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    given = [text.get(key) for key in keys_of_sizes]
    if not all(isinstance(size, int) and size > 0 for size in given):
        raise CheckpointError(f"{path}: does not tell the sizes of the model's layers; name the model with --base")
    hidden, inner, heads = (int(size or 0) for size in given)
    groups, head = text.get("num_key_value_heads") or heads, text.get("head_dim") or hidden // heads
    if not isinstance(groups, int) or not isinstance(head, int):
        raise CheckpointError(f"{path}: has sizes that are no numbers; fetch it again")
    queries, keys = heads * head, groups * head
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (int(text.get("vocab_size") or 0), hidden),
    }
    unknown = [module for module in adapter.trained if module.rpartition(".")[2] not in sizes]
    if unknown:
        raise CheckpointError(f"{path}: does not tell the sizes of {listed(unknown)}; name the model with --base")
    found = {module: sizes[module.rpartition(".")[2]] for module in adapter.trained}
    for module, shape in found.items():
        trained = adapter.trained[module]
        if reason := trained.mismatch((shape[0], shape[1])):
            raise MergeError(f"{path}: {module} {list(shape)} does not fit its shard: {reason}")
    return found
