"""What an adapter holds besides shards: trained modules, biases, heads, resized vocabularies, other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, edit_json, make_adapter, make_base, weights
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
    extra = {
        "classifier.weight": torch.ones(5, 32),
        "classifier.bias": torch.ones(5),
        "v_head.weight": torch.ones(7, 32),
    }
    save_file({**load_file(path), **{f"base_model.model.{name}": value for name, value in extra.items()}}, path)
    edit_json(
        tmp_path / "adapter" / "adapter_config.json", modules_to_save=["classifier", "v_head"], task_type="SEQ_CLS"
    )
    merge(tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert len(config["id2label"]) == 5
    edit_json(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["v_head"], task_type="CAUSAL_LM")
    save_file({name: value for name, value in load_file(path).items() if "classifier" not in name}, path)
    merge(tmp_path / "adapter", tmp_path / "value")
    assert "5" not in json.loads((tmp_path / "value" / "config.json").read_text()).get("id2label", {})


def test_tie_that_cannot_be_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True, shards="1GB")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    state = load_file(base / "model.safetensors")
    state["model.other.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(FossilExportError, match="cannot be told"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_classifier_on_a_decoder(base: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", base, model_class=LlamaForSequenceClassification, task_type="SEQ_CLS")
    trained.config.pad_token_id = 0
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", pad_token_id=0)
    assert type(model) is LlamaForSequenceClassification
    torch.testing.assert_close(model(TOKENS + 1).logits, trained(TOKENS + 1).logits, rtol=1e-4, atol=1e-5)


def renamed(folder: Path, target: Path, rename: Any) -> None:
    """A checkpoint with other tensor names, in one file."""
    target.mkdir()
    save_file({rename(name): value.clone() for name, value in weights(folder).items()}, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


@pytest.mark.parametrize(
    "trained, stored",
    [
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
        ("language_model.model.", "model.language_model."),
        ("model.", ""),
        ("", "model."),
    ],
)
def test_names_of_other_transformers_versions(trained: str, stored: str, base: Path, tmp_path: Path) -> None:
    """The same weights under the names that the checkpoint has and those that the training had."""
    make_adapter(tmp_path / "adapter", base, target_modules=[*LINEARS])
    merge(tmp_path / "adapter", tmp_path / "plain")
    renamed(base, tmp_path / "other", lambda name: name.replace("model.", stored, 1))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    save_file(
        {name.replace("base_model.model.model.", f"base_model.model.{trained}"): v for name, v in state.items()}, path
    )
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other")
    got, want = weights(tmp_path / "merged"), weights(tmp_path / "plain")
    assert all(torch.equal(got[name.replace("model.", stored, 1)], value) for name, value in want.items())


def test_two_parts_that_fit_are_not_guessed_between(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    doubled = {f"{part}.{name}": value.clone() for name, value in weights(base).items() for part in ("left", "right")}
    save_file(doubled, tmp_path / "other" / "model.safetensors")
    with pytest.raises(FossilExportError, match=r"could be left\.model\.layers.* right\.model\.layers"):
        merge(adapter, tmp_path / "merged", base=tmp_path / "other")


def test_vision_and_text_parts_move_each_to_their_own(base: Path, tmp_path: Path) -> None:
    """Both parts have `layers.N.self_attn.q_proj` of one shape; the known spellings tell them apart."""
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tensors = {}
    for name, value in weights(base).items():
        tensors[f"language_model.{name}"] = value.clone()
        tensors[f"vision_tower.vision_{name}"] = value.clone() + 1
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = {}
    for name, value in load_file(path).items():
        tail = name.removeprefix("base_model.model.model.")
        state[f"base_model.model.model.language_model.{tail}"] = value
        state[f"base_model.model.model.vision_tower.vision_model.{tail}"] = value * 2
    save_file(state, path)
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other")
    after = weights(tmp_path / "merged")
    for layer in (0, 1):
        shard = state[f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.miss_block"]
        tiled = shard.T.repeat(1, 6)
        for head, factor in (("language_model.model", 1), ("vision_tower.vision_model", 2)):
            name = f"{head}.layers.{layer}.self_attn.q_proj.weight"
            assert torch.equal(after[name], tensors[name] + factor * tiled)


def test_incomplete_adapter_is_warned_of(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    gone = "base_model.model.model.layers.1.mlp.down_proj.miss_block"
    save_file({name: value for name, value in state.items() if name != gone}, path)
    result = merge(adapter, tmp_path / "merged")
    assert "model.layers.1.mlp.down_proj" in result.warnings[0]
    edit_json(adapter / "adapter_config.json", layers_to_transform=[0])
    assert not merge(adapter, tmp_path / "narrowed").warnings
