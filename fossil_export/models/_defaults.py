"""What the config of a model type needs besides its defaults, so that transformers makes a model of it."""

from __future__ import annotations

from typing import Any

_HEADS = {"head_dim": 128}
_FORECAST = {"prediction_length": 4}
# A backbone of transformers' own, where the default is one of timm's.
_BACKBONE = {
    "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
}
_NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": _FORECAST,
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "conditional_detr": _BACKBONE,
    "dab-detr": _BACKBONE,
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deformable_detr": _BACKBONE,
    "detr": _BACKBONE,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": {"text_config": _HEADS},
    "hunyuan_vl_text": _HEADS,
    "informer": _FORECAST,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": _HEADS,
    "nemotron": {"num_key_value_heads": 8},
    "omdet-turbo": _BACKBONE,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "table-transformer": _BACKBONE,
    "time_series_transformer": _FORECAST,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}


# Values that only together give a class its other parameters.
_OTHER: dict[str, dict[str, Any]] = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "conv_kernel_size": 3,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["c2p", "p2c"],
        "relative_attention": True,
        "share_att_key": False,
    },
}


def other(model_type: str) -> dict[str, Any]:
    """Changes to the content that are no one field's."""
    return _OTHER.get(model_type, {})


def content(model_type: str) -> dict[str, Any]:
    """The content of the shortest config.json that makes a model of a type."""
    return {"model_type": model_type, **_NEEDED.get(model_type, {})}
