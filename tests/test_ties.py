"""Parameters that training parted: what is stored, what the config says, what is refused; the live model judges."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ties_tools
import torch
from conftest import edit_json, make_adapter, make_base, weights
from safetensors.torch import load_file, save_file
from ties_tools import IDS, agrees
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fossil_export import FossilExportError, merge, plan_merge, verify
from fossil_export.adapters import Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.merging._brought import Brought
from fossil_export.merging._naming import Naming
from fossil_export.merging._placement import Placement
from fossil_export.merging._ties import part
from fossil_export.merging._vocabulary import is_vocabulary
from fossil_export.models import Architecture, Names, Tie

bart = ties_tools.bart
bert = ties_tools.bert

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
