"""The metadata of a model card, as the Hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from card_tools import BASE, CERTIFICATE, LLAVA, LOCAL, RECORD, TOKENIZER, facts, local, metadata
from huggingface_hub import metadata_load

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards import model_card
from fossil_export.cards._task import pipeline_tag


@pytest.mark.parametrize(
    ("kind", "relation", "library", "tags"),
    [
        ("merged", "finetune", "transformers", []),
        ("lora", "adapter", "peft", ["lora"]),
        ("miss", "adapter", "peft", []),
        ("adapter", "adapter", "peft", ["lora", "peft", "fossil-export"]),
        ("gguf-lora", "adapter", None, ["lora", "gguf"]),
        ("onnx", "finetune", None, ["onnx", "onnxruntime-genai"]),
    ],
)
def test_metadata_of_every_kind(kind: str, relation: str, library: str | None, tags: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(facts(kind)))
    expected = {
        "base_model": BASE,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": "llama3.2",
        "language": ["en", "de"],
        "tags": ["fossil", "miss", "tile", "fossil-export", *tags] if kind != "adapter" else tags,
    }
    assert metadata_load(tmp_path / "README.md") == {key: value for key, value in expected.items() if value}
    metadata((tmp_path / "README.md").read_text())


def test_int4_is_quantized_and_bone_is_named() -> None:
    record = {**(facts("onnx").record or {}), "precision": "int4"}
    assert metadata(model_card(facts("onnx", record=record)))["base_model_relation"] == "quantized"
    bone = {**RECORD, "adapter": {"peft_type": "BONE", "variant": "bat", "rank": 8}}
    assert metadata(model_card(facts(record=bone)))["tags"] == ["fossil", "miss", "bone", "bat", "fossil-export"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_is_published(kind: str) -> None:
    certificate = {**CERTIFICATE, "parity": False, "reason": f"{LOCAL}/model.safetensors: lm_head.weight differs"}
    card = model_card(local(kind, certificate=certificate))
    assert "/home" not in card
    assert {"base_model", "base_model_relation", "license", "language"}.isdisjoint(metadata(card))
    assert "not on the Hub" in card
    assert "model.safetensors: lm\\_head.weight" in card or "model.safetensors: lm_head.weight" in card


def test_a_path_given_as_base_is_no_base() -> None:
    assert LOCAL not in model_card(facts(base=LOCAL))
    assert "base_model" not in metadata(model_card(facts(base=LOCAL)))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("LICENSE", f"https://huggingface.co/{BASE}/blob/main/LICENSE"),
        ("./docs/MY LICENSE", f"https://huggingface.co/{BASE}/blob/main/docs/MY%20LICENSE"),
        ("https://example.org/license", "https://example.org/license"),
    ],
)
def test_license_of_the_base(link: str, expected: str) -> None:
    given = {"license": "other", "license_name": "it's: mine", "license_link": link, "language": False}
    found = metadata(model_card(facts(base_card=given)))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "it's: mine", expected)
    assert found["language"] == "no"
    own = metadata(model_card(facts(base_card=given), "---\nlicense: mit\n---\n# Mine\n"))
    assert own["license"] == "mit" and "license_link" not in own


CAUSAL, SEQUENCE = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["LlamaForSequenceClassification"]}


@pytest.mark.parametrize(
    ("kind", "config", "base", "expected"),
    [
        ("merged", CAUSAL, None, "text-generation"),
        ("merged", {"architectures": ["GPT2LMHeadModel"]}, None, "text-generation"),
        ("merged", SEQUENCE, "text-generation", "text-classification"),
        ("merged", {"architectures": ["BertForTokenClassification"]}, "fill-mask", "token-classification"),
        ("merged", {"architectures": ["BertForQuestionAnswering"]}, "fill-mask", "question-answering"),
        ("merged", SEQUENCE, "text-ranking", "text-ranking"),
        ("merged", CAUSAL, "image-text-to-text", "image-text-to-text"),
        ("merged", CAUSAL, "feature-extraction", "feature-extraction"),
        ("merged", LLAVA, None, "image-text-to-text"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, None, "text-generation"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, "translation", "translation"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, "text2text-generation", "text-generation"),
        ("merged", {"architectures": ["WhisperForConditionalGeneration"]}, None, "automatic-speech-recognition"),
        ("merged", {"architectures": ["BertModel"]}, "sentence-similarity", "sentence-similarity"),
        ("merged", {"architectures": ["BertModel"]}, None, None),
        ("merged", None, None, None),
        ("lora", {"task_type": "SEQ_CLS"}, "text-generation", "text-classification"),
        ("miss", {"task_type": "TOKEN_CLS"}, "fill-mask", "token-classification"),
        ("miss", {"task_type": "SEQ_2_SEQ_LM"}, None, "text-generation"),
        ("miss", {"task_type": None}, "text-generation", "text-generation"),
        ("gguf-lora", None, None, "text-generation"),
    ],
)
def test_pipeline_tag(kind: str, config: dict[str, Any] | None, base: str | None, expected: str | None) -> None:
    card = {"pipeline_tag": base} if base else None
    assert pipeline_tag(facts(kind, config=config, base_card=card)) == expected


def test_task_of_an_onnx_classifier_comes_from_its_record() -> None:
    record = {"mode": "merged", "graph": "model.onnx", "config_edits": SEQUENCE}
    found = facts("onnx", record=record, files=("model.onnx", *TOKENIZER))
    assert metadata(model_card(found))["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["zh", False, None, 7], ["zh", "no"]), (7, None), ([None], None), ("de", "de"), (False, "no")],
)
def test_languages_that_are_no_words_are_left_out(given: Any, expected: Any) -> None:
    assert metadata(model_card(facts(base_card={"language": given}))).get("language") == expected
