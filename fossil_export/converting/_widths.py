"""How wide each trained layer is: from the headers of the base's weights, or from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.converting._options import Options
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging._place import place
from fossil_export.storage import resolve

Shapes = dict[str, tuple[int, int]]


_PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite",
)  # fmt: skip
# Families all of whose layers have the sizes that the config names.


def layer_shapes(adapter: Adapter, options: Options) -> tuple[Shapes, frozenset[str]]:
    """(out, in) of each trained module, and the names of all modules of the base with a matrix (empty if unknown).

    Of a base, they are those that a merge would take. Reads headers only. Raises MergeError if what was trained
    does not fit, CheckpointError without base and config.
    """
    if options.base_config is not None:
        path = resolve(options.base_config, CheckpointError, "base config")
        config = read_json(path / "config.json" if path.is_dir() else path, CheckpointError)
        return _by_config(adapter, config, path), frozenset()
    assert options.base is not None
    base = options.base.checkpoint()
    with options.base.by_name():
        placement = place(adapter, base, into_floats=False)
    found = {trained.module: placement.into[name].shape for name, trained in placement.trained.items()}
    if idle := [module for module in adapter.trained if module not in found]:
        raise MergeError(
            f"{adapter.path}: trained {listed(idle)}, which this model never calls, so that they did nothing; a server "
            "may call them: merge the adapter instead"
        )
    renamed = {name.removesuffix(".weight"): trained.module for name, trained in placement.trained.items()}
    matrices = (info for info in base.tensors.values() if info.name.endswith(".weight") and len(info.shape) > 1)
    modules = (info.name.removesuffix(".weight") for info in matrices)
    return found, frozenset(renamed.get(module, module) for module in modules)


def _by_config(adapter: Adapter, config: Mapping[str, Any], path: Path) -> Shapes:
    """By the names that Llama and its kin give their layers."""
    if adapter.config.get("layer_replication"):
        raise MergeError(
            f"{adapter.path}: was trained on repeated layers (layer_replication), which only a merge makes; merge it, "
            "and go on with the merged model"
        )
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
        "embed_tokens": (int(text.get("vocab_size") or 0), hidden),
    }
    owners = {name: trained.owner.rpartition(".")[2] for name, trained in adapter.trained.items()}
    unknown = [name for name, owner in owners.items() if owner not in sizes]
    if unknown:
        raise CheckpointError(f"{path}: does not tell the sizes of {listed(unknown)}; name the model with --base")
    found = {name: sizes[owner] for name, owner in owners.items()}
    for module, shape in found.items():
        trained = adapter.trained[module]
        if trained.dimensions == 1:
            shape = found[module] = (shape[0], 1)
        if reason := trained.mismatch((shape[0], shape[1])):
            raise MergeError(f"{path}: {module} {list(shape)} does not fit what was trained: {reason}")
    return found
