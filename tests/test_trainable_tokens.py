"""Rows of tokens that were trained are where the live model has them, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TrainableTokensConfig
from places_tools import SMALL, edit_weights, saved, scene
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fossil_export import convert, load_adapter, merge, verify
from fossil_export.errors import AdapterError, FossilExportError, MergeError, OnnxError
from fossil_export.onnx._refusals import check_mode

TOKENS = [3, 7, 8, 9, 1]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CASES: dict[str, dict[str, Any]] = {
    "a list": {"trainable_token_indices": TOKENS},
    "both, the same tokens": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "both, other tokens": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [1, 2]}},
    "the head": {"trainable_token_indices": {"lm_head": [1, 2]}},
    "both, with layers of their own": {"trainable_token_indices": {"embed_tokens": TOKENS, "m_head": TOKENS}},
    "resized": {"trainable_token_indices": [64, 3, 65], "resize": 66},
    "a type of its own": {"kind": TrainableTokensConfig, "token_indices": TOKENS},
}
PARTED = ("both, other tokens", "the head", "both, with layers of their own")


def llama(tie: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tie))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_the_merged_model_has_the_rows_that_the_live_one_has(name: str, tie: bool, tmp_path: Path) -> None:
    found = scene(tmp_path, llama(tie), **CASES[name])
    found.merge()
    config = json.loads((found.merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tie and name not in PARTED)
    assert (HEAD in weights(found.merged)) is not config["tie_word_embeddings"]


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_both_of_a_tied_pair_that_the_files_hold_twice_get_the_rows(other: float, tmp_path: Path) -> None:
    """transformers ties them if they are equal; PEFT shares the rows in either case."""
    saved(llama(True), tmp_path)
    edit_weights(tmp_path / "base", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + other}))
    found = scene(tmp_path, llama(True), trainable_token_indices=TOKENS)
    found.merge()
    merged = weights(found.merged)
    assert torch.equal(merged[HEAD][TOKENS], merged[EMBEDDING][TOKENS])
    assert torch.equal(merged[HEAD], merged[EMBEDDING]) is (other == 0)


@given(tokens=st.lists(st.integers(0, 119), min_size=1, max_size=12, unique=True), data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_stored_as_they_are_and_all_others_stay(
    tokens: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    base = make_base(folder / "base", dtype)
    make_adapter(folder / "adapter", base, kind=TrainableTokensConfig, token_indices=tokens, target_modules=None)
    merge(folder / "adapter", folder / "merged")
    before, after = weights(base), weights(folder / "merged")
    rows = next(iter(weights(folder / "adapter").values()))
    wanted = before[EMBEDDING].index_copy(0, torch.tensor(tokens), rows.to(dtype))
    assert torch.equal(after[EMBEDDING], wanted)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != EMBEDDING)
    assert verify(folder / "merged", level="weights").parity


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
    ],
)
def test_scaled_and_shared_embeddings(model: Any, tmp_path: Path) -> None:
    found = scene(tmp_path, model(), target_modules=["q_proj", "q"], trainable_token_indices=TOKENS)
    assert found.merge().plan.count("replace") == 1


def test_a_row_that_is_not_the_trained_one_is_found(tmp_path: Path) -> None:
    found = scene(tmp_path, llama(False), trainable_token_indices=TOKENS)
    found.merge()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING][7, 2] += 1

    edit_weights(found.merged, change)
    problems = verify(found.merged, level="weights").problems
    assert any(EMBEDDING in line for line in problems)


@pytest.mark.parametrize(
    "tokens, why",
    [([3, 3], "twice"), ([-1], "negative"), ([1, 2], "not a row for each of the 2 tokens"), (None, "which tokens")],
)
def test_tokens_that_do_not_say_what_was_trained_are_refused(tokens: Any, why: str, base: Path, tmp_path: Path) -> None:
    given = tokens if tokens in ([3, 3], [-1]) else [1]
    make_adapter(tmp_path / "a", base, kind=LoraConfig, target_modules=["q_proj"], trainable_token_indices=given)
    edit_json(tmp_path / "a" / "adapter_config.json", trainable_token_indices=tokens)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "a")


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    found = scene(tmp_path, llama(False), trainable_token_indices=[63])
    edit_json(found.adapter / "adapter_config.json", trainable_token_indices=[64])
    with pytest.raises(MergeError, match="token 64 was trained, and the weight has 64 rows"):
        merge(found.adapter, tmp_path / "out")
    edit_weights(found.adapter, lambda tensors: _narrow(tensors))
    edit_json(found.adapter / "adapter_config.json", trainable_token_indices=[3])
    with pytest.raises(MergeError, match="its rows have 16 values, the weight's 32"):
        merge(found.adapter, tmp_path / "out")


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    (name,) = (one for one in tensors if "tokens" in one)
    tensors[name] = tensors[name][:, :16]


def test_a_shared_parameter_that_was_saved_with_two_values_is_refused(tmp_path: Path) -> None:
    found = scene(tmp_path, llama(True), kind=TrainableTokensConfig, token_indices=TOKENS)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (one for one in tensors if "lm_head" in one)
        tensors[name] = tensors[name] + 1

    edit_weights(found.adapter, change)
    with pytest.raises(MergeError, match="one parameter in the model that was trained"):
        merge(found.adapter, tmp_path / "out")


def test_two_adapters_may_bring_other_tokens_and_not_the_same(base: Path, tmp_path: Path) -> None:
    for name, tokens in {"a": [1, 2], "b": [3], "c": [2]}.items():
        make_adapter(
            tmp_path / name, base, kind=TrainableTokensConfig, token_indices=tokens, target_modules=["embed_tokens"]
        )
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    changed = (weights(base)[EMBEDDING] != weights(tmp_path / "ab")[EMBEDDING]).any(1).nonzero().flatten().tolist()
    assert changed == [1, 2, 3]
    with pytest.raises(MergeError, match="changes in another way"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")


def test_rows_are_no_branch(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", base, kind=LoraConfig, target_modules=["q_proj"], trainable_token_indices=[1])
    with pytest.raises(OnnxError, match="lora_tokens"):
        check_mode(load_adapter(tmp_path / "a"), "merged")
    with pytest.raises(FossilExportError):
        convert(tmp_path / "a", tmp_path / "out", to="lora", base=base)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["a list", "both, other tokens", "the head", "a type of its own"])
def test_rows_of_a_head_with_a_bias_are_refused_because_peft_leaves_the_bias_out(
    name: str, tie: bool, tmp_path: Path
) -> None:
    model = PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=tie))
    saved(model, tmp_path)
    edit_weights(tmp_path / "base", lambda tensors: tensors["lm_head.bias"].add_(1))
    found = scene(tmp_path, model, **CASES[name])
    if not tie and name in ("a list", "a type of its own"):
        found.merge()  # nothing touches the head
        return
    with pytest.raises(MergeError, match=r"lm_head.weight .* leaves lm_head.bias of .* out"):
        found.merge()


def test_so_are_those_of_a_masked_model_whose_bias_is_stored_by_another_name(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SMALL.items() if name != "num_key_value_heads"}
    found = scene(
        tmp_path, BertForMaskedLM(BertConfig(**sizes)), trainable_token_indices=TOKENS, target_modules=["key"]
    )
    with pytest.raises(MergeError, match=r"leaves cls.predictions.decoder.bias of .* out"):
        found.merge()
