"""What a model does, in the words of transformers' pipelines and of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards._facts import Facts

_HEADS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "ctc",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
}
_TASK_TYPES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
_ON_THE_HUB = {
    "text2text": "text-generation",
    "text2text-generation": "text-generation",
    "ctc": "automatic-speech-recognition",
    "sound": None,
}
"""The Hub's word for what has a finer one here. text2text-generation is no pipeline of it any more but a part of
text-generation (huggingface.js, packages/tasks/src/pipelines.ts)."""

CLASSIFIERS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
)
_HEADED = (*CLASSIFIERS, "object-detection", "image-segmentation", "depth-estimation")
_STAYS = {
    "text-classification": ("zero-shot-classification", "text-ranking"),
    "question-answering": ("document-question-answering", "table-question-answering"),
    "image-segmentation": ("mask-generation",),
}
# Finer names that a base's card may have for the same head.
_SOUND = {"num_mel_bins", "audio_config", "feat_extract_norm", "feature_projection_input_dim"}
_PICTURES = {"num_channels", "image_size", "patch_size"}
_OF_SPEECH = ("Whisper", "Speech", "Moonshine")


def task(facts: Facts) -> str | None:
    """What the artifact's own config says it does: a pipeline's name, "text2text" for encoder-decoders, "ctc" for
    speech without a decoder, "sound" for a model of sound without a head."""
    config, record = facts.config or {}, facts.record or {}
    if config.get("task_type") in _TASK_TYPES:
        return _TASK_TYPES[config["task_type"]]
    edits = record.get("config_edits")
    given = config.get("architectures") or (edits.get("architectures") if isinstance(edits, dict) else None)
    name = str(given[0]) if isinstance(given, list) and given else ""
    known = name or _trained_in(config)
    for ending, found in _HEADS.items():
        if known.endswith(ending):
            return _of_input(found, config)
    if known.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "image-text-to-text"
        if known.startswith(_OF_SPEECH) or "num_mel_bins" in config:
            return "automatic-speech-recognition"
        if "audio_config" in config:
            return "audio-text-to-text"
        if name and config.get("is_encoder_decoder", True):
            return "text2text"
    if name.endswith("Model"):
        return _without_head(config)
    if not name and "genai_config.json" in facts.files:
        return "text-generation"
    return None if name else KINDS[facts.kind].task


def _of_input(found: str, config: Mapping[str, Any]) -> str | None:
    """Heads of one name stand on models of text, of sound and of scanned pages."""
    if found == "text-classification" and config.keys() & _SOUND:
        return "audio-classification"
    return None if "max_2d_position_embeddings" in config else found


def _without_head(config: Mapping[str, Any]) -> str | None:
    if "vision_config" in config and "text_config" in config:
        return "zero-shot-image-classification" if "projection_dim" in config else None
    if config.keys() & _PICTURES and "vocab_size" not in config:
        return "image-feature-extraction"
    return "sound" if config.keys() & (_SOUND - {"audio_config"}) else None


def _trained_in(config: Mapping[str, Any]) -> str:
    """The class that PEFT writes down for an adapter without a task type."""
    mapping = config.get("auto_mapping")
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return found if isinstance(found, str) else ""


def pipeline_tag(facts: Facts) -> str | None:
    """The base's, unless the adapter gave the model another head."""
    own, card = task(facts), facts.base_card or {}
    given = card.get("pipeline_tag")
    given = given if isinstance(given, str) and given else None
    own, given = (_ON_THE_HUB.get(name, name) if name is not None else None for name in (own, given))
    if own in _HEADED:
        return given if given in _STAYS.get(own, ()) else own
    if own is not None and given in (*_HEADED, "fill-mask"):
        return own
    return given or own
