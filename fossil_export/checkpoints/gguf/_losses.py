"""What of a GGUF file transformers does not read, so that its model may differ from llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.gguf._families import ROPE
from fossil_export.checkpoints.gguf._file import GgufFile
from fossil_export.errors import listed

if TYPE_CHECKING:
    from fossil_export.models._gguf import Made

_SAME = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "use_parallel_residual": "use_parallel_residual",
}
"""Keys of llama.cpp that a config has under these names: nothing is lost if both are equal."""
_CHANGING = (
    "rope.",
    "softcapping",
    "scale",
    "sliding_window",
    "expert",
    "_length",
    "epsilon",
    "head_count",
    "parallel",
)
_HARMLESS = ("rope.dimension_count", "rope.scaling.finetuned", "context_length", "feed_forward_length")
_SCALED = {"gemma2": (46, "27B"), "gemma3": (62, "27B")}
"""Sizes whose scale of attention llama.cpp knows by the number of layers."""


def losses(file: GgufFile, made: Made) -> Iterator[str]:
    """A line on what may be another model than the file's."""
    prefix = f"{file.architecture}."
    lost = [name for name in ROPE if name in file.tensors]
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if key == name or name in made.read or name in _HARMLESS or not any(part in name for part in _CHANGING):
            continue
        if name == "rope.scaling.type" and value == "none":
            continue
        if name not in _SAME or not _equal(_found(made.config, _SAME[name]), value):
            lost.append(key)
    rotary = file.metadata.get(f"{prefix}rope.dimension_count")
    if "rope.dimension_count" in made.read and rotary is not None and not _rotates(made.config, rotary):
        lost.append(f"{prefix}rope.dimension_count")
    layers, size = _SCALED.get(file.architecture, (0, ""))
    if layers and file.metadata.get(f"{prefix}block_count") == layers:
        lost.append(f"the attention scale of the {size} model")
    if lost:
        yield (
            f"{file.path}: transformers does not read {listed(lost)} of a GGUF file, so that the model may differ from "
            "what llama.cpp runs; compare the merged config.json with that of the original model"
        )


def _rotates(config: Any, count: Any) -> bool:
    """Whether so many values of a head are rotated, by the config."""
    head = config.get("head_dim")
    if head is None and config.get("num_attention_heads"):
        head = config["hidden_size"] // config["num_attention_heads"]
    parameters = config.get("rope_parameters")
    part = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    part = part if part is not None else config.get("partial_rotary_factor")
    return head is None or int(head * (1 if part is None else part)) == count


def _found(config: Any, key: str) -> Any:
    if key == "head_dim" and config.get(key) is None and config.get("num_attention_heads"):
        return config["hidden_size"] // config["num_attention_heads"]
    parameters = config.get("rope_parameters")
    if key not in config and isinstance(parameters, dict):
        return parameters.get(key)
    return config.get(key)


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other)) if numbers else bool(one == other)
