"""What of a GGUF file transformers does not read, so that its model may differ from llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.gguf._families import ROPE
from fossil_export.checkpoints.gguf._file import GgufFile
from fossil_export.errors import listed

if TYPE_CHECKING:
    from fossil_export.models._gguf import Made

_SAME: Mapping[str, tuple[str, ...]] = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "rope.freq_base": ("rope_theta",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""What a config calls keys of llama.cpp, the first of these names that it has: nothing is lost if both are equal."""
_CHANGING = (
    *("rope.", "softcapping", "scale", "sliding_window", "expert", "_length", "epsilon", "head_count"),
    *("parallel", "dt_b_c_rms", "layernorm"),
)
_HARMLESS = ("rope.dimension_count", "rope.scaling.finetuned", "context_length", "feed_forward_length")
_SCALED = {"gemma2": (46, "27B"), "gemma3": (62, "27B")}
"""Sizes whose scale of attention llama.cpp knows by the number of layers."""


def losses(file: GgufFile, made: Made) -> Iterator[str]:
    """A line on what may be another model than the file's."""
    if made.beside:
        but = f", although the file says otherwise on {listed(list(made.differing))}" if made.differing else ""
        yield f"{file.path}: the config.json beside it is taken{but}"
        return
    prefix = f"{file.architecture}."
    lost = [name for name in ROPE if name in file.tensors]
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if (
            not value
            or key == name
            or name in made.read
            or name in _HARMLESS
            or not any(part in name for part in _CHANGING)
        ):
            continue
        if name == "rope.scaling.type" and value == "none":
            continue
        if not _equal(_found(made.config, _SAME.get(name, ())), value):
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
            "what llama.cpp runs; put the config.json of the original model beside the file"
        )


def _rotates(config: Mapping[str, Any], count: Any) -> bool:
    """Whether so many values of a head are rotated, by the config."""
    part = _found(config, ("partial_rotary_factor",))
    head = _found(config, ("head_dim",))
    return head is None or int(head * (1 if part is None else part)) == count


def _found(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """What a config has for the first of these names, at its top or of its rotary positions; else of heads, their size
    by their number."""
    parameters = config.get("rope_parameters")
    for part in (config, parameters if isinstance(parameters, dict) else {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    if names == ("head_dim",) and config.get("num_attention_heads") and config.get("hidden_size"):
        return config["hidden_size"] // config["num_attention_heads"]
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))  # float32 there
    return bool(one == other)
