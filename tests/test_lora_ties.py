"""LoRA on tied embeddings and heads: the merged model is the live one, whether PEFT kept the tie or parted it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json, weights
from places_tools import SMALL, edit_weights, saved, scene
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fossil_export import merge
from fossil_export.errors import MergeError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TARGETS = {"embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"]}


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": True, **more}))


def gemma() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8))


def is_tied(folder: Path) -> bool:
    tied: bool = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert (HEAD in weights(folder)) or tied
    return tied


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("which", list(TARGETS))
def test_a_lora_parts_them_even_if_peft_keeps_its_tensors_tied(which: str, ensure: bool, tmp_path: Path) -> None:
    found = scene(tmp_path, llama(), target_modules=[*TARGETS[which], "q_proj"], ensure_weight_tying=ensure)
    found.merge()
    assert not is_tied(found.merged)


def test_a_lora_that_is_neither_targeted_nor_tied_to_the_embeddings_is_refused(tmp_path: Path) -> None:
    found = scene(tmp_path, llama(), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    edit_json(found.adapter / "adapter_config.json", target_modules=["embed_tokens"])
    with pytest.raises(MergeError, match=r"target_modules does not cover model\.layers\.0\.self_attn\.q_proj"):
        merge(found.adapter, found.merged)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("which", list(TARGETS))
def test_whole_ones_stay_tied_if_peft_kept_them_so(which: str, ensure: bool, tmp_path: Path) -> None:
    found = scene(tmp_path, llama(), modules_to_save=list(TARGETS[which]), ensure_weight_tying=ensure)
    found.merge()
    assert is_tied(found.merged) is ensure


@pytest.mark.parametrize("ensure", [False, True])
def test_a_base_that_holds_both(ensure: bool, tmp_path: Path) -> None:
    edit_weights(saved(llama(), tmp_path), lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    scene(tmp_path, llama(), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=ensure).merge()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "resize": 70},
        {"target_modules": ["q_proj", "lm_head"], "resize": 70},
        {"target_modules": ["q_proj", "embed_tokens"], "resize": 70, "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
)
def test_a_new_vocabulary_and_one_trained_whole_beside_the_other(config: dict[str, Any], tmp_path: Path) -> None:
    found = scene(tmp_path, llama(), **config)
    found.merge()
    assert not is_tied(found.merged)
    rows = config.get("resize", 64)
    assert {weights(found.merged)[name].shape[0] for name in (HEAD, EMBEDDING)} == {rows}


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("which", list(TARGETS))
def test_an_embedding_that_is_scaled(which: str, ensure: bool, tmp_path: Path) -> None:
    scene(tmp_path, gemma(), target_modules=[*TARGETS[which], "q_proj"], ensure_weight_tying=ensure).merge()


@pytest.mark.parametrize("targets", [["shared"], ["lm_head"], ["embed_tokens"]])
def test_ties_that_no_config_undoes_are_refused(targets: list[str], tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    found = scene(tmp_path, model, target_modules=[*targets, "q"])
    with pytest.raises(MergeError, match="whatever its config says"):
        merge(found.adapter, found.merged)


def test_a_lora_and_rows_of_tokens_that_share_a_head_are_refused(tmp_path: Path) -> None:
    found = scene(tmp_path, llama(), target_modules=["q_proj", "lm_head"], trainable_token_indices=[1, 2])
    with pytest.raises(MergeError, match="in two ways"):
        merge(found.adapter, found.merged)


@pytest.mark.parametrize(
    "model, config, replaced",
    [
        (lambda: llama(attention_bias=True, mlp_bias=True), {"bias": "all"}, 14),
        (lambda: llama(attention_bias=True, mlp_bias=True), {"bias": "lora_only"}, 2),
        (lambda: PhiForCausalLM(PhiConfig(**SMALL)), {"bias": "all", "lora_bias": True}, 14),
    ],
)
def test_biases_that_were_trained_whole(model: Any, config: dict[str, Any], replaced: int, tmp_path: Path) -> None:
    assert scene(tmp_path, model(), **config).merge().plan.count("replace") == replaced
