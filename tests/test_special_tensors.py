"""What an adapter holds besides shards: trained modules, biases, heads, resized vocabularies, other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
)

from fossil_export import FossilExportError, merge

TOKENS = torch.arange(20)[None]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "resize": 128},
    ],
    ids=lambda options: "-".join(f"{key}:{value}" for key, value in options.items()),
)
def test_head_and_embedding_are_what_was_trained(options: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=tie)
    trained = make_adapter(tmp_path / "adapter", base, **options)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    # Resizing alone keeps a tied head tied; any other of these trainings parts the two.
    stays_tied = tie and "modules_to_save" not in options and "lm_head" not in options["target_modules"]
    assert config["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in weights(tmp_path / "merged")) == (not stays_tied)
    assert config["vocab_size"] == (options.get("resize") or 120) == len(model.get_input_embeddings().weight)
    assert result.plan.config is None or result.plan.config_edits


def test_tied_head_without_its_own_weight_starts_from_the_embedding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    trained = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "base_layer" not in name}, path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_resized_vocabulary_with_a_targeted_head(tmp_path: Path) -> None:
    """PEFT saves the head's base layer but not the embedding: the same tensor when tied, lost when not."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "resize": 128}
    tied = make_base(tmp_path / "tied", tie=True)
    trained = make_adapter(tmp_path / "tied-adapter", tied, **options)
    merge(tmp_path / "tied-adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-5)
    apart = make_base(tmp_path / "apart")
    make_adapter(tmp_path / "apart-adapter", apart, **options)
    with pytest.raises(FossilExportError, match=r"embed_tokens.*, has 120; .*save_embedding_layers=True"):
        merge(tmp_path / "apart-adapter", tmp_path / "other")


def test_saved_module_takes_the_bases_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"], dtype=torch.float32)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert saved.dtype == torch.float32
    assert torch.equal(weights(tmp_path / "merged")["lm_head.weight"], saved.bfloat16())
    assert result.plan.count("replace") == 1


@pytest.mark.parametrize("bias, count", [("all", 13), ("miss_only", 2)])
def test_trained_biases(bias: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["query_key_value"], bias=bias)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    saved = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if name.endswith("bias")]
    assert len(saved) == result.plan.count("replace") == count
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-5)


def make_bert(folder: Path, prefixed: bool) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    model = BertForSequenceClassification(config) if prefixed else BertModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifier_on_an_encoder(task: str, prefixed: bool, tmp_path: Path) -> None:
    """The head comes with the adapter; the base may be the bare encoder, without the `bert.` prefix."""
    base = make_bert(tmp_path / "base", prefixed)
    kind = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}[task]

    class WithLabels:
        @staticmethod
        def from_pretrained(path: Path, **options: Any) -> Any:
            return kind.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True, **options)

    targets = ["query", "value", "output.dense"]
    trained = make_adapter(tmp_path / "adapter", base, model_class=WithLabels, target_modules=targets, task_type=task)
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = kind.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 3 and type(model).__name__ == model.config.architectures[0]
    torch.testing.assert_close(model.eval()(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_labels_come_from_the_classifier_alone(tmp_path: Path) -> None:
    """Other modules that were trained whole have outputs of their own."""
    base = make_bert(tmp_path / "base", prefixed=True)
    make_adapter(tmp_path / "adapter", base, model_class=AutoModelForSequenceClassification, target_modules=["query"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = {"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.ones(5)}
    save_file({**load_file(path), **{f"base_model.model.{name}": value for name, value in extra.items()}}, path)
    settings = tmp_path / "adapter" / "adapter_config.json"
    edit_json(settings, modules_to_save=["classifier"], task_type="SEQ_CLS")
    merge(tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert len(config["id2label"]) == 5
    # A head that the class does not have (a reward model's) would be lost on load.
    save_file({**load_file(path), "base_model.model.v_head.weight": torch.ones(7, 32)}, path)
    edit_json(settings, modules_to_save=["classifier", "v_head"])
    with pytest.raises(FossilExportError, match=r"v_head.weight has no counterpart .*BertForSequenceCl"):
        merge(tmp_path / "adapter", tmp_path / "lost")


def test_classifier_on_a_decoder(base: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", base, model_class=LlamaForSequenceClassification, task_type="SEQ_CLS")
    trained.config.pad_token_id = 0
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", pad_token_id=0)
    assert type(model) is LlamaForSequenceClassification
    torch.testing.assert_close(model(TOKENS + 1).logits, trained(TOKENS + 1).logits, rtol=1e-4, atol=1e-5)


def test_incomplete_adapter_is_warned_of(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    gone = "base_model.model.model.layers.1.mlp.down_proj.miss_block"
    save_file({name: value for name, value in state.items() if name != gone}, path)
    result = merge(adapter, tmp_path / "merged")
    assert "model.layers.1.mlp.down_proj" in result.warnings[0]
    edit_json(adapter / "adapter_config.json", exclude_modules=["model.layers.1.mlp.down_proj"])
    assert not merge(adapter, tmp_path / "narrowed").warnings
