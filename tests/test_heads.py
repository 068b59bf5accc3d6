"""Heads that training changed or a base lacks, labels, resized vocabularies: the model is loaded whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ties_tools
import torch
from conftest import edit_json, make_adapter, make_base, randomise, weights
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from ties_tools import agrees
from transformers import (
    AutoModelForImageClassification,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaForCausalLM,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fossil_export import FossilExportError, merge, plan_merge, verify
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.merging._naming import naming_of

bart = ties_tools.bart
bert = ties_tools.bert


@pytest.mark.parametrize("whole", [["word_embeddings", "decoder"], ["word_embeddings"], ["decoder"], None])
def test_a_resized_vocabulary_with_a_bias(whole: list[str] | None, bert: Path, tmp_path: Path) -> None:
    """PEFT writes what it saved thrice then: as it is, as a copy, and as it was before training."""
    live = make_adapter(
        tmp_path / "adapter", bert, r=4, target_modules=["query"], model_class=BertForMaskedLM, resize=70,
        modules_to_save=whole,
    )  # fmt: skip
    merge(tmp_path / "adapter", tmp_path / "merged")
    after = weights(tmp_path / "merged")
    assert not any("modules_to_save" in name or "original_module" in name for name in after)
    agrees(tmp_path / "merged", BertForMaskedLM, live)


def test_labels_under_another_name_are_held_against_the_class(bert: Path, tmp_path: Path) -> None:
    """A head of five labels on a base whose config says two: told by the task, or by what the class would have."""
    options = {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    make_adapter(tmp_path / "adapter", bert, model_class=BertForSequenceClassification, task_type="SEQ_CLS", **options)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.classifier.{}"
    save_file({**state, name.format("weight"): torch.ones(5, 32), name.format("bias"): torch.ones(5)}, path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]) == 5
    trained_in = {"base_model_class": "BertForSequenceClassification", "parent_library": "transformers"}
    edit_json(tmp_path / "adapter" / "adapter_config.json", task_type=None, auto_mapping=trained_in)
    edit_json(bert / "config.json", num_labels=3)
    merge(tmp_path / "adapter", tmp_path / "untold")
    assert BertForSequenceClassification.from_pretrained(tmp_path / "untold").num_labels == 5
    assert len(json.loads((tmp_path / "untold" / "config.json").read_text())["id2label"]) == 5
    save_file({**state, name.format("weight"): torch.ones(5, 32), name.format("bias"): torch.ones(4)}, path)
    with pytest.raises(
        FossilExportError, match=r"classifier.* has shape \[4.*BertForSequenceClassification .* has \[5"
    ):
        merge(tmp_path / "adapter", tmp_path / "not")


def test_of_two_heads_for_the_labels_the_one_that_was_not_saved_must_fit_too(tmp_path: Path) -> None:
    config = DeiTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    kind = DeiTForImageClassificationWithTeacher
    kind(config).save_pretrained(tmp_path / "base")
    for saved in (["cls_classifier", "distillation_classifier"], ["cls_classifier"]):
        live = kind.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
        live = get_peft_model(live, MissConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
        live.save_pretrained(tmp_path / f"adapter{len(saved)}")
    merge(tmp_path / "adapter2", tmp_path / "merged")
    _, report = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    with pytest.raises(
        FossilExportError, match=r"distillation_classifier.bias has shape \[2\], .* has \[5\], and 1 more"
    ):
        merge(tmp_path / "adapter1", tmp_path / "not")


def test_what_did_not_fit_the_config_before_is_not_the_merges_fault(bert: Path, tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "pooler"]}
    make_adapter(tmp_path / "adapter", bert, model_class=BertForSequenceClassification, **options)
    name = "bert.embeddings.position_embeddings.weight"
    save_file({**weights(bert), name: torch.ones(40, 32)}, bert / "model.safetensors", {"format": "pt"})
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert weights(tmp_path / "merged")[name].shape == (40, 32)


def test_of_classes_that_lack_something_the_one_that_lacks_least_is_taken(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path / "base"))
    saved = ["model.norm.weight", "lm_head.weight", "own.weight"]
    adapter: Any = SimpleNamespace(name="adapter", config={}, trained={}, saved=saved)
    assert naming_of(adapter, base).model.name == "LlamaForCausalLM"


def test_a_saved_batch_norm_brings_its_integers(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    base = tmp_path / "base"
    AutoModelForImageClassification.from_config(config).save_pretrained(base)
    make_adapter(
        tmp_path / "adapter", base, r=1, target_modules=["classifier.1"], modules_to_save=["normalization"],
        model_class=AutoModelForImageClassification,
    )  # fmt: skip
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    assert counts
    save_file({**state, counts[0]: torch.tensor(7)}, path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert weights(tmp_path / "merged")[counts[0].removeprefix("base_model.model.")].item() == 7
    assert verify(tmp_path / "merged", level="weights").parity


def test_a_base_without_its_head_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=False, shards="1GB")
    make_adapter(tmp_path / "adapter", base)
    state = load_file(base / "model.safetensors")
    save_file({name: value for name, value in state.items() if "lm_head" not in name}, base / "model.safetensors")
    (warning,) = plan_merge(tmp_path / "adapter").warnings
    assert "has no lm_head.weight, which LlamaForCausalLM of its config.json has and nothing ties" in warning
    assert LlamaForCausalLM.from_pretrained(base, output_loading_info=True)[1]["missing_keys"]


@pytest.mark.parametrize("whole", [None, ["shared"], ["shared", "lm_head"]])
def test_a_resized_vocabulary_whose_bias_peft_does_not_save(
    whole: list[str] | None, bart: Path, tmp_path: Path
) -> None:
    """`final_logits_bias` is a buffer: the merged model could not be loaded."""
    make_adapter(
        tmp_path / "adapter", bart, r=4, target_modules=["q_proj"], model_class=BartForConditionalGeneration, resize=70,
        modules_to_save=whole,
    )  # fmt: skip
    with pytest.raises(FossilExportError, match=r"final_logits_bias, .* has 60; .*resize_token_embeddings\(70\)"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    larger = BartForConditionalGeneration.from_pretrained(bart)
    larger.resize_token_embeddings(70, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "larger")
    _, report = BartForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("resize", [None, 128])
@pytest.mark.parametrize("named", [..., None, [], [None, 5, {}, ["LlamaForCausalLM"]]])
def test_a_config_that_names_no_class(named: Any, resize: int | None, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    edit_json(base / "config.json", architectures=named)
    live = make_adapter(tmp_path / "adapter", base, task_type="CAUSAL_LM", modules_to_save=["lm_head"], resize=resize)
    merge(tmp_path / "adapter", tmp_path / "merged")
    agrees(tmp_path / "merged", LlamaForCausalLM, live)


def test_labels_of_a_class_without_a_task_type(tmp_path: Path) -> None:
    """Images are classified without a task_type in PEFT; the number of labels is what the class's config would say."""
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    live = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=5)
    live = get_peft_model(live, MissConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier"]))
    randomise(live)
    live.eval().save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    made = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert made["architectures"] == ["ViTForImageClassification"] and len(made["id2label"]) == 5
    loaded, report = ViTForImageClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixels).logits, live(pixels).logits, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "merged", level="weights").parity


def test_what_was_random_in_training_and_is_lost_is_told(bert: Path, tmp_path: Path) -> None:
    """A masked language model has no pooler, the classifier over it trained with a random one, and PEFT did not save
    that."""
    options = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    for whole, lost in ((["classifier"], True), (["classifier", "pooler"], False)):
        make_adapter(
            tmp_path / "adapter", bert, model_class=BertForSequenceClassification, modules_to_save=whole, **options
        )
        warnings = plan_merge(tmp_path / "adapter").warnings
        assert any("bert.pooler.dense.weight" in line and "random" in line for line in warnings) is lost


def test_a_head_of_which_neither_base_nor_adapter_has_all(bert: Path, tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(bert).bert.save_pretrained(tmp_path / "inner")
    make_adapter(
        tmp_path / "adapter", tmp_path / "inner", r=4, target_modules=["query"], model_class=BertForMaskedLM,
        modules_to_save=["word_embeddings"],
    )  # fmt: skip
    with pytest.raises(FossilExportError, match=r"cls.predictions.bias and cls.predictions.decoder.bias, and neither"):
        merge(tmp_path / "adapter", tmp_path / "merged")
