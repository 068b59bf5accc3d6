"""Tiny configs by rule: all widths are divided by one factor, so that what must divide what still does.

Heads keep their number where they can; layers, experts, vocabularies, positions and images become few. What the rules
cannot know of a family is in `families`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from sweep import families

VOCABULARY = 160  # all vocabularies are alike, so that a shard or a table that goes to the wrong one is not noticed
_FIRST_TOKEN = 120
_CODES = 64  # a power of two
_POSITIONS = 256

_LAYERS = re.compile(
    r"^(n_layers?|num_layers|depth|layers|num_blocks|max_window_layers|(\w+_)?(num_hidden_layers|layers|depth))$"
)
_KEPT_LAYERS = re.compile(r"^(num_feature_levels|.*feature_layers?|.*select_layers?|num_upsampling_layers)$")
_EXPERTS = re.compile(r"^((\w+_)?(n_routed_experts|num_experts|num_local_experts)|num_expert)$")
_CHOSEN = re.compile(r"^((\w+_)?(num_experts_per_tok\w*|top_k_experts|moe_topk|moe_k|experts_per_token))$")
_GROUPS = re.compile(r"^(n_group|topk_group|n_expert_groups|router_topk_group)$")
_VOCABULARIES = re.compile(r"^((\w+_)?vocab_size|vocab_size_\w+|num_embeds|num_embeddings|n_token|n_words)$")
_CODEBOOKS = re.compile(r"^((\w+_)?codebook_size|codebook_entries)$")
_KEPT_VOCABULARY = re.compile(r"^type_vocab_size$")
_TOKENS = re.compile(r"^(\w*token_ids?|\w*token_index|vocab_offset|\w*_token)$")
_POSITIONAL = re.compile(
    r"^(\w*max_position_embeddings|n_positions|max_source_positions|max_target_positions|max_2d_position_embeddings"
    r"|n_ctx|max_seq_len|max_text_len|sliding_window|attention_chunk_size|local_attention|max_sequence_length"
    r"|original_max_position_embeddings|rel_extent|query_length)$"
)
_WIDTHS = re.compile(
    r"(hidden_size|hidden_sizes|_dim|^dim|channels|channel_list|intermediate_size|width|n_embd|d_model|d_ff|d_kv|d_inner"
    r"|n_inner|ffn_size|embedding_size|projection_size|lora_rank|_feat_size|input_size|output_size|proj_size|n_embed"
    r"|d_head|head_size|bottleneck_size|_rank|pooler_size|stem_channel|depths_width|embed_dim\w*|query_pre_attn_scalar"
    r"|coordinate_size|shape_size|d_rel|latent_size|state_size|expert_capacity|ffn_hidden\w*|units|rotary_dim"
    r"|time_step_rank|d_state|patch_embeds?_hidden_size|backbone_channel\w*|vq_\w*dim|hidden_units|conv_dim|tdnn_dim"
    r"|intermediate|mamba_expand_size|n_inner|\w+_multiple_of|hidden_size_per_layer_input|upsample_groups)s?$|feed_forward_size$"
)
_HEAD_WIDTHS = re.compile(r"head_dim$|^d_kv$|^d_head$")
_KEPT_WIDTHS = re.compile(r"(num_channels|^in_channels|in_chans|input_channels|num_input_channels|mlp_dim_factor)$")
_KINDS = re.compile(r"^(layer_types|mlp_layer_types|indexer_types|layers_block_type|block_types|attn_types)$")
_PER_LAYER = re.compile(r"^(layer_rope_theta|no_rope_layers|activation_sparsity_pattern|layers_num_\w+)$")
_HEADS = {
    "hidden_size": ("num_attention_heads", "num_heads", "attention_heads"),
    "embed_dim": ("num_heads",),
    "d_model": ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"),
    "n_embd": ("n_head",),
    "encoder_hidden_dim": ("encoder_attention_heads",),
}
_DEPTHS = re.compile(r"^(depths|\w+_depths|blocks_per_stage|num_block_repeats|stage_num_blocks|encoder_num_\w*blocks)$")


def variants(name: str, config_class: Any) -> Iterator[dict[str, Any]]:
    """Arguments for `config_class`, the smallest first; a later one is for models that the ones before do not fit."""
    plain = families.default(config_class)
    widest = _widest(plain)
    first = next(factor for factor in (64, 32, 16, 8, 4, 2, 1) if factor == 1 or widest / factor >= 48)
    special = families.overrides(name, plain)
    factors = dict.fromkeys([first, max(1, first // 2), max(1, first // 4), max(1, first // 8), 1])
    for small_images in (True, False):
        for factor in factors:
            made = _shrunk(plain, factor, small_images)
            if zlib.crc32(str(plain.model_type).encode()) % 2:
                equal = _equal_widths(made, plain)
                if equal is not None:
                    yield families.merged(equal, special)
            yield families.merged(made, special)


def _widest(config: Any) -> int:
    widths = [value for key, value in vars(config).items() if _is_main(key) and isinstance(value, int)]
    return max([64 if widths else 512, *widths, *(_widest(part) for part in _parts(config).values())])


def _is_main(key: str) -> bool:
    return key in (
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "embed_dim",
        "emb_dim",
        "decoder_hidden_size",
        "num_filters",
    )


def _parts(config: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if hasattr(value, "to_dict") and key[0] != "_"}


def _shrunk(config: Any, factor: int, small_images: bool) -> dict[str, Any]:
    known = {field.name for field in fields(config)} if is_dataclass(config) else set(vars(config))
    layers = _layer_count(config)
    deep = vars(config).get("num_hidden_layers")
    made: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key[0] == "_" or key not in known or value is None:
            continue
        if hasattr(value, "to_dict"):
            made[key] = {"model_type": value.model_type} | _shrunk(value, factor, small_images)
            continue
        if isinstance(value, (list, tuple)) and len(value) == deep and deep > 4 and not _KINDS.match(key):
            value = value[:layers]
            made[key] = value
        small = _value(key, value, factor, layers)
        if small != value:
            made[key] = small
    _divide(made, config)
    _sections(made, config)
    if small_images:
        made |= _image(config, known)
    return made


def _layer_count(config: Any) -> int:
    """Two, or as many as there are kinds of layers."""
    kinds = [len(set(value)) for key, value in vars(config).items() if _KINDS.match(key) and value]
    return max([2, *kinds])


def _value(key: str, value: Any, factor: int, layers: int) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)) and value:
        return _list(key, list(value), factor, layers)
    if not isinstance(value, int):
        return value
    return _number(key, value, factor, layers)


def _number(key: str, value: int, factor: int, layers: int) -> int:
    if _TOKENS.match(key):
        return value if value < _FIRST_TOKEN else _FIRST_TOKEN + zlib.crc32(key.encode()) % (VOCABULARY - _FIRST_TOKEN)
    if _LAYERS.match(key) and not _KEPT_LAYERS.match(key):
        return min(value, layers)
    if _EXPERTS.match(key):
        return min(value, 4)
    if _CHOSEN.match(key):
        return min(value, 2)
    if key in ("chunk_size", "mamba_chunk_size"):  # sequences are padded to it
        return min(value, 16)
    if key == "num_queries":
        return min(value, 8)
    if _GROUPS.match(key):
        return min(value, 1)
    if _VOCABULARIES.match(key) and not _KEPT_VOCABULARY.match(key):
        return VOCABULARY if value > VOCABULARY else value
    if _CODEBOOKS.match(key):
        return min(value, _CODES)
    if _POSITIONAL.match(key):
        return min(value, _POSITIONS)
    if _WIDTHS.search(key) and not _KEPT_WIDTHS.search(key):
        return _width(value, factor, key)
    return value


def _width(value: int, factor: int, key: str = "") -> int:
    if _HEAD_WIDTHS.search(key):  # rotary embeddings cut it in halves and sections
        return min(value, max(16, -(-value // (16 * factor)) * 16))
    if value % factor == 0:
        return value // factor
    return value if value < 2 * factor else -(-value // factor)


def _list(key: str, value: list[Any], factor: int, layers: int) -> list[Any]:
    if _KINDS.match(key):
        kinds = list(dict.fromkeys(value))
        return (kinds * layers)[:layers]
    if _PER_LAYER.match(key):
        return value[:layers]
    if _DEPTHS.match(key):
        return [min(depth, 1 + (place == 2)) for place, depth in enumerate(value)]
    if _TOKENS.match(key):
        return [_number("token_id", entry, factor, layers) if isinstance(entry, int) else entry for entry in value]
    if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value) and _WIDTHS.search(key):
        return [_width(entry, factor) if not _KEPT_WIDTHS.search(key) else entry for entry in value]
    return value


def _sections(made: dict[str, Any], config: Any) -> None:
    """Rotary embeddings of several axes: their sections are half a head together."""

    def now(key: str) -> Any:
        return made.get(key, vars(config).get(key))

    if {"qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"} <= set(vars(config)):
        made["qk_head_dim"] = now("qk_nope_head_dim") + now("qk_rope_head_dim")
    rope = vars(config).get("rope_parameters")
    if "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()) or not isinstance(rope, dict):
        return
    if not rope or any(isinstance(value, dict) for value in rope.values()):
        return  # one for each kind of layer
    width = now("head_dim") or now("hidden_size") // now("num_attention_heads")
    half = max(3, int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2)
    made["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _divide(made: dict[str, Any], config: Any) -> None:
    """As many heads as divide the width, where they have no width of their own."""
    for width_key, heads_keys in _HEADS.items():
        width = made.get(width_key, vars(config).get(width_key))
        if not isinstance(width, int) or vars(config).get("head_dim"):
            continue
        for key in heads_keys:
            heads = made.get(key, vars(config).get(key))
            if not isinstance(heads, int) or heads < 1 or width % (16 * heads) == 0:
                continue
            most = min(heads, 4)
            made[key] = max(
                (n for n in range(1, most + 1) if width % n == 0),
                key=lambda n: (max(size for size in (1, 2, 4, 8, 12, 16) if width % (size * n) == 0) >= 8, n),
            )
            shared = vars(config).get("num_key_value_heads")
            if isinstance(shared, int) and key == "num_attention_heads":
                made["num_key_value_heads"] = max(
                    n for n in range(1, made[key] + 1) if made[key] % n == 0 and n <= shared
                )


def _image(config: Any, known: set[str]) -> dict[str, Any]:
    """Four patches a side."""
    size, patch = vars(config).get("image_size"), vars(config).get("patch_size")
    if "image_size" not in known or not isinstance(size, (int, list, tuple)) or isinstance(size, bool):
        return {}
    side = patch[-1] if isinstance(patch, (list, tuple)) else patch
    side = side * 4 if isinstance(side, int) and side > 4 else 64
    return {"image_size": side if isinstance(size, int) else type(size)([side] * len(size))}


def _equal_widths(made: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """The parts as wide as the text: then a shard in the wrong part has the right shape. None if there is one part."""
    parts = _parts(config)
    if "text_config" not in parts or len(parts) < 2:
        return None
    wanted = {}
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        value = made["text_config"].get(key, getattr(parts["text_config"], key, None))
        if isinstance(value, int):
            wanted[key] = value
    equal = dict(made)
    for key, part in parts.items():
        if key in ("vision_config", "audio_config"):
            equal[key] = made[key] | {name: value for name, value in wanted.items() if name in vars(part)}
    return equal
