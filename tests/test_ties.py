"""Parameters that training parted: what is stored, what the config says, what is refused; the live model judges."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, randomise, weights
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fossil_export import FossilExportError, merge, plan_merge, verify
from fossil_export.adapters import Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.merging._brought import Brought
from fossil_export.merging._naming import Naming, naming_of
from fossil_export.merging._placement import Placement
from fossil_export.merging._ties import part
from fossil_export.merging._vocabulary import is_vocabulary
from fossil_export.models import Architecture, Names, Tie

IDS = torch.arange(3, 15).reshape(1, -1)


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    config = BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=40,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def agrees(folder: Path, kind: Any, live: Any) -> None:
    """The folder is loaded whole, and answers as the live model does."""
    loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, live(IDS).logits, rtol=1e-4, atol=1e-4)


CHANGES: dict[str, dict[str, Any]] = {
    "encoder's embedding": {"target_modules": ["q_proj"], "modules_to_save": ["encoder.embed_tokens"]},
    "shared": {"target_modules": ["q_proj"], "modules_to_save": ["shared"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "shard on the head": {"target_modules": ["q_proj", "lm_head"]},
    "decoder's and head": {"target_modules": ["v_proj"], "modules_to_save": ["decoder.embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_parted_model_stores_all_that_its_config_unties(what: str, bart: Path, tmp_path: Path) -> None:
    """`tie_word_embeddings: false` unties the embeddings of encoder and decoder too, which would be random then."""
    live = make_adapter(tmp_path / "adapter", bart, r=4, model_class=BartForConditionalGeneration, **CHANGES[what])
    merge(tmp_path / "adapter", tmp_path / "merged")
    after = weights(tmp_path / "merged")
    names = {"lm_head.weight", "model.shared.weight", "model.encoder.embed_tokens.weight"}
    assert names | {"model.decoder.embed_tokens.weight"} <= after.keys()
    agrees(tmp_path / "merged", BartForConditionalGeneration, live)
    assert verify(tmp_path / "merged", level="weights").parity
    for gone in sorted(names):
        save_file(
            {name: value for name, value in after.items() if name != gone}, tmp_path / "merged" / "model.safetensors"
        )
        assert any(gone in problem for problem in verify(tmp_path / "merged", level="weights").problems)


def test_a_tie_put_back_in_the_config_is_found(bart: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", bart, r=4, model_class=BartForConditionalGeneration, **CHANGES["head"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    edit_json(tmp_path / "merged" / "config.json", tie_word_embeddings=True)
    (problem, *_) = verify(tmp_path / "merged", level="weights").problems
    assert "ties tensors that training parted" in problem


@pytest.mark.parametrize("settings", [{"modules_to_save": ["decoder"]}, {"modules_to_save": ["word_embeddings"]}])
def test_the_bias_of_a_head_is_parted_with_it(settings: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    live = make_adapter(
        tmp_path / "adapter", bert, r=4, target_modules=["query"], model_class=BertForMaskedLM, **settings
    )
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert {"cls.predictions.decoder.bias", "cls.predictions.bias"} <= weights(tmp_path / "merged").keys()
    agrees(tmp_path / "merged", BertForMaskedLM, live)


def test_of_two_adapters_one_parts_the_embedding_and_one_the_head(bert: Path, tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["query"], "model_class": BertForMaskedLM}
    make_adapter(tmp_path / "embedding", bert, **options, modules_to_save=["word_embeddings"])
    make_adapter(tmp_path / "head", bert, **options, modules_to_save=["decoder"])
    found = []
    for order in (1, -1):
        merge([tmp_path / "embedding", tmp_path / "head"][::order], tmp_path / f"merged{order}")
        found.append(weights(tmp_path / f"merged{order}"))
    saved = {
        name: value
        for folder in ("embedding", "head")
        for name, value in load_file(tmp_path / folder / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model."
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"):
        assert torch.equal(found[0][name], saved[prefix + name]) and torch.equal(found[1][name], saved[prefix + name])


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


def test_an_old_config_without_a_model_type(bert: Path, tmp_path: Path) -> None:
    live = make_adapter(
        tmp_path / "adapter", bert, r=4, target_modules=["query", "decoder"], model_class=BertForMaskedLM
    )
    edit_json(bert / "config.json", model_type=...)
    merge(tmp_path / "adapter", tmp_path / "merged")
    edit_json(tmp_path / "merged" / "config.json", model_type="bert")
    agrees(tmp_path / "merged", BertForMaskedLM, live)


@pytest.mark.parametrize("tie", [1, 0, "true", [True]])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_tie_that_is_neither_true_nor_false_is_refused(tie: Any, part: str | None, tmp_path: Path) -> None:
    """Loaders do not agree on what 1 is: some tie, and the trained embedding would become the head too."""
    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens"])
    said = {"tie_word_embeddings": tie}
    edit_json(base / "config.json", **(said if part is None else {part: said}))
    with pytest.raises(FossilExportError, match=r"tie_word_embeddings is .* not true or false"):
        plan_merge(tmp_path / "adapter")


def test_what_is_tied_beside_embeddings_is_no_vocabulary() -> None:
    """Zamba2 ties whole layers; a tensor of theirs in another shape is not a resized vocabulary."""
    pairs = (("lm_head.weight", "model.embed_tokens.weight"), ("model.two.weight", "model.one.weight"))
    ties = tuple(Tie(target, source, True) for target, source in pairs)
    model = Architecture("Zamba2", "zamba2", frozenset(), ties=ties, embedding="model.embed_tokens", head="lm_head")
    naming = Naming(Names(model, ()))
    base = cast(Checkpoint, None)  # asked only of models that are not known
    found = [is_vocabulary(name, naming, base) for name in ("lm_head.weight", "model.one.weight", "model.two.weight")]
    assert found == [True, False, False]


def test_of_classes_that_lack_something_the_one_that_lacks_least_is_taken(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path / "base"))
    saved = ["model.norm.weight", "lm_head.weight", "own.weight"]
    adapter: Any = SimpleNamespace(name="adapter", config={}, trained={}, saved=saved)
    assert naming_of(adapter, base).model.name == "LlamaForCausalLM"


def test_a_tie_of_another_field_stays() -> None:
    ties = (Tie("b.weight", "a.weight", True, ("first",)), Tie("d.weight", "c.weight", True, ("second",)))
    names = frozenset(f"{letter}.weight" for letter in "abcd")
    stored = {name: TensorInfo(name, "F32", (4, 4), Path("base"), 0) for name in ("a.weight", "c.weight")}
    base: Any = SimpleNamespace(location="base", tensors=stored, config={})
    naming = Naming(Names(Architecture("Two", "two", names, ties=ties, embedding="a"), stored))
    adapter: Any = SimpleNamespace(keeps_ties=False, path="adapter", files=[Path("adapter")], config={})
    placement, brought = Placement(), Brought(trained={"d.weight": Trained("d", "lora", {}, {})})
    assert part(naming, adapter, base, brought, placement) == {"d.weight": "c.weight"}
    assert placement.untie == (("second",),)


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


def test_what_a_class_ties_for_good_is_refused(tmp_path: Path) -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).save_pretrained(tmp_path / "base")
    make_adapter(
        tmp_path / "adapter", tmp_path / "base", r=4, target_modules=["q", "lm_head"],
        model_class=T5ForConditionalGeneration,
    )  # fmt: skip
    with pytest.raises(FossilExportError, match=r"ties shared.weight and .* such a model cannot be stored"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_without_its_head_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=False, shards="1GB")
    make_adapter(tmp_path / "adapter", base)
    state = load_file(base / "model.safetensors")
    save_file({name: value for name, value in state.items() if "lm_head" not in name}, base / "model.safetensors")
    (warning,) = plan_merge(tmp_path / "adapter").warnings
    assert "has no lm_head.weight, which LlamaForCausalLM of its config.json has and nothing ties" in warning
    assert LlamaForCausalLM.from_pretrained(base, output_loading_info=True)[1]["missing_keys"]


def test_shards_that_did_nothing_in_training_are_told_and_left_out(tmp_path: Path) -> None:
    """Mamba computes with `dt_proj.weight` and never calls the layer, beside which PEFT puts its shard."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=1, intermediate_size=64)
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    live = make_adapter(tmp_path / "adapter", tmp_path / "base", r=2, target_modules=["dt_proj"])
    plain = MambaForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(live(IDS).logits, plain(IDS).logits)
    (warning,) = plan_merge(tmp_path / "adapter").warnings
    assert "backbone.layers.0.mixer.dt_proj: this model computes with the weights of these layers and never" in warning
    assert "left out" in warning
    live = make_adapter(tmp_path / "both", tmp_path / "base", r=2, target_modules=["dt_proj", "in_proj"])
    merge(tmp_path / "both", tmp_path / "merged")
    merged = MambaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(live(IDS).logits, merged(IDS).logits, atol=1e-5)
    assert not torch.allclose(plain(IDS).logits, merged(IDS).logits, atol=1e-3)
    assert verify(tmp_path / "merged", level="weights").parity
    make_adapter(tmp_path / "other", tmp_path / "base", r=2, target_modules=["x_proj"])
    assert not plan_merge(tmp_path / "other").warnings


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


@pytest.mark.parametrize("whole", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"])
@pytest.mark.parametrize("size", [50, 60])
def test_a_class_that_ties_others_where_its_config_has_two_vocabularies(whole: str, size: int, tmp_path: Path) -> None:
    config = MarianConfig(
        vocab_size=60, decoder_vocab_size=size, share_encoder_decoder_embeddings=False, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
        decoder_attention_heads=4, max_position_embeddings=40, pad_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(tmp_path / "base")
    live = make_adapter(
        tmp_path / "adapter", tmp_path / "base", r=4, target_modules=["q_proj"], modules_to_save=[whole],
        model_class=MarianMTModel,
    )  # fmt: skip
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert "model.shared.weight" not in weights(tmp_path / "merged")
    loaded, report = MarianMTModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        ours, theirs = (model(IDS, decoder_input_ids=IDS).logits for model in (loaded.eval(), live))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "merged", level="weights").parity


def test_a_base_that_has_neither_of_two_tied_tensors_names_both(bert: Path, tmp_path: Path) -> None:
    make_adapter(
        tmp_path / "adapter", bert, r=4, model_class=BertForMaskedLM, target_modules=["query"],
        modules_to_save=["word_embeddings"],
    )  # fmt: skip
    stored = {name: value for name, value in weights(bert).items() if name != "cls.predictions.bias"}
    save_file(stored, bert / "model.safetensors")
    with pytest.raises(
        FossilExportError, match=r"ties cls\.predictions\.bias and cls\.predictions\.decoder\.bias, and neither"
    ):
        plan_merge(tmp_path / "adapter")


def test_a_base_that_has_neither_of_two_tied_tensors_of_which_one_was_trained_names_both(
    bert: Path, tmp_path: Path
) -> None:
    stored = {name: value for name, value in weights(bert).items() if name != "cls.predictions.bias"}
    save_file(stored, tmp_path / "less.safetensors", {"format": "pt"})
    make_adapter(
        tmp_path / "adapter", bert, r=4, model_class=BertForMaskedLM, target_modules=["query"],
        modules_to_save=["decoder"],
    )  # fmt: skip
    (tmp_path / "less.safetensors").replace(bert / "model.safetensors")
    with pytest.raises(FossilExportError, match=r"ties cls\.predictions\.bias and .*decoder\.bias, and neither"):
        plan_merge(tmp_path / "adapter")
