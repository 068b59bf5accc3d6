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
}
_TASK_TYPES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
CLASSIFIERS = ("text-classification", "token-classification", "question-answering", "image-classification")
_STAYS = {"text-classification": ("zero-shot-classification", "text-ranking")}
# Finer names that a base's card may have for the same head.


def task(facts: Facts) -> str | None:
    """What the artifact's own config says it does: a pipeline's name, or "text2text" for encoder-decoders."""
    config, record = facts.config or {}, facts.record or {}
    if config.get("task_type") in _TASK_TYPES:
        return _TASK_TYPES[config["task_type"]]
    edits = record.get("config_edits")
    given = config.get("architectures") or (edits.get("architectures") if isinstance(edits, dict) else None)
    name = str(given[0]) if isinstance(given, list) and given else ""
    for ending, found in _HEADS.items():
        if (name or _trained_in(config)).endswith(ending):
            return found
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "image-text-to-text"
        # Whisper and its like are encoder-decoders too, of sound.
        if config.get("is_encoder_decoder", True) and not {"num_mel_bins", "audio_config"} & config.keys():
            return "text2text"
    if not name and "genai_config.json" in facts.files:
        return "text-generation"
    return None if name else KINDS[facts.kind].task


def _trained_in(config: Mapping[str, Any]) -> str:
    """The class that PEFT writes down for an adapter without a task type."""
    mapping = config.get("auto_mapping")
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return found if isinstance(found, str) else ""


def pipeline_tag(facts: Facts) -> str | None:
    """The base's, unless the adapter gave the model another head. text2text-generation is no pipeline of the Hub any
    more but a part of text-generation (huggingface.js, packages/tasks/src/pipelines.ts)."""
    own = task(facts)
    given = (facts.base_card or {}).get("pipeline_tag")
    given = given if isinstance(given, str) and given else None
    own, given = ("text-generation" if name in ("text2text", "text2text-generation") else name for name in (own, given))
    if own in CLASSIFIERS:
        return given if given in _STAYS.get(own, ()) else own
    if own is not None and given in (*CLASSIFIERS, "fill-mask"):
        return own
    return given or own
