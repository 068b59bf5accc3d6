"""What the rules of `shrinking` cannot know of a family."""

from __future__ import annotations

from typing import Any

_BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 160,
}
_VIT = {
    "model_type": "vit",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
}
_SPEECH = {
    "model_type": "wav2vec2",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "vocab_size": 160,
}
_DECODER = _BERT | {"is_decoder": True, "add_cross_attention": True}

PARTS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"encoder": _BERT, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": _VIT, "decoder": _DECODER},
    "speech-encoder-decoder": {"encoder": _SPEECH, "decoder": _DECODER},
    "vision-text-dual-encoder": {"vision_config": _VIT, "text_config": _BERT},
}
"""Configs that have no default: they are made of others."""

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_OWN_BACKBONE: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": _RESNET,
}  # the default needs timm

SPECIAL: dict[str, dict[str, Any]] = {
    "detr": _OWN_BACKBONE,
    "conditional_detr": _OWN_BACKBONE,
    "deformable_detr": _OWN_BACKBONE,
    "dab-detr": _OWN_BACKBONE,
    "table-transformer": _OWN_BACKBONE,
    "omdet-turbo": _OWN_BACKBONE,
    "time_series_transformer": {"prediction_length": 4},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "mamba2": {"hidden_size": 64, "expand": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "hunyuan_vl_text": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "hiera": {"image_size": [64, 64]},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 32},
    "nemotron": {"num_key_value_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "perceiver": {"d_latents": 64, "qk_channels": 32, "v_channels": 64, "d_model": 40},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {"num_key_value_heads": 2},
}
"""By model type, over what the rules give."""


def default(config_class: Any) -> Any:
    """Raises what the config class raises where it has no default."""
    return config_class(**PARTS.get(config_class.model_type, {}))


def overrides(name: str, config: Any) -> dict[str, Any]:
    special = SPECIAL.get(config.model_type, {})
    if name.endswith("ForSequenceClassification") and getattr(config, "pad_token_id", None) is None:
        special = special | {"pad_token_id": 0}
    if name.endswith("ForCTC") and getattr(config, "vocab_size", 0) is None:
        special = special | {"vocab_size": 160}
    return special | PARTS.get(config.model_type, {})


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts are taken together."""
    made = dict(first)
    for key, value in second.items():
        before = made.get(key)
        made[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return made
