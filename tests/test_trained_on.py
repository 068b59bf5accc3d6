"""Adapters whose training quantized the base on loading (QLoRA), merged into the base that it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json
from peft import LoraConfig, get_peft_model
from quantized_bases import SIZES, adapter_for, fp8_folder, plain_model
from quantized_training import as_loaded, card, settings
from refusal_tools import refused, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fossil_export import inspect, merge, plan_merge
from fossil_export.errors import MergeError


def same(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("base") / "plain")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    return adapter_for(plain, tmp_path / "adapter")


EXACT = [settings(double_quant=False), settings(double_quant=False, llm_int8_skip_modules=["q_proj", "lm_head"])]
NEARLY = [settings(), settings("fp4", False), settings("int8")]
# Training ran on a GPU, whose codes for values in the middle between two are others than the processor's.


@pytest.mark.parametrize("asked", EXACT + NEARLY)
def test_a_merge_is_that_into_what_bitsandbytes_loads(
    asked: dict[str, Any], plain: Path, adapter: Path, tmp_path: Path
) -> None:
    seen = as_loaded(plain, tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen, trained_on="unquantized")
    (adapter / "README.md").write_text(card(asked))
    result = merge(adapter, tmp_path / "merged")
    if asked in EXACT:
        same(tmp_path / "merged", tmp_path / "wanted")
    else:
        assert 0 < differing(tmp_path / "merged", tmp_path / "wanted") < 0.001
        assert differing(tmp_path / "merged", merge(adapter, tmp_path / "plain", into="original").output) > 0.5
    assert result.plan.trained_on is not None and not any("it seems" in line for line in result.warnings)
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    kind = "int8" if "load_in_8bit" in asked else asked["bnb_4bit_quant_type"]
    assert record["into"] == "trained" and record["trained_on"]["kind"] == kind
    assert record["trained_on"].get("double_quant") == asked.get("bnb_4bit_use_double_quant")
    assert record["trained_on"]["skip_modules"] == asked.get("llm_int8_skip_modules")


def differing(one: Path, other: Path) -> float:
    """Share of the values of linear layers that are not equal."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    names = [name for name in theirs if "proj" in name]
    assert ours.keys() == theirs.keys() and all(ours[name].dtype == theirs[name].dtype for name in names)
    wrong = sum(int((ours[name] != theirs[name]).sum()) for name in names)
    return wrong / sum(theirs[name].numel() for name in names)


def test_how_far_quantization_moved_the_base_is_told(plain: Path, adapter: Path, tmp_path: Path) -> None:
    """In the result, the record and by inspect, whatever the updates are added to; as bitsandbytes moves it."""
    seen = load_file(as_loaded(plain, tmp_path / "seen", settings()) / "model.safetensors")
    stored = load_file(plain / "model.safetensors")
    (adapter / "README.md").write_text(card(settings()))
    for into in ("trained", "original"):
        result = merge(adapter, tmp_path / into, into=into)
        record = json.loads((tmp_path / into / "fossil_export.json").read_text())
        told = (result.to_dict()["quantization"], record["quantization"], inspect(adapter).to_dict()["quantization"])
        assert told[0] == told[1] == told[2] and len(told[0]) == 7
        for kind, ratio in result.ratios.items():
            names = [name for name in stored if kind in name]
            squares = [float((stored[name].double() - seen[name].double()).square().sum()) for name in names]
            assert ratio.modules == 2 and ratio.quantization == pytest.approx(sum(squares) ** 0.5, rel=0.002)
        doubts = [line for line in result.warnings if "another model" in line or "--into trained" in line]
        assert len(doubts) == (2 if into == "original" else 0)


def test_a_base_that_was_not_quantized_is_not_measured(adapter: Path, tmp_path: Path) -> None:
    result = merge(adapter, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert not result.ratios and not {"quantization", "trained_on", "into"} & record.keys()


def test_into_the_original_nothing_but_the_updates_changes(plain: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "wanted", trained_on="unquantized")
    result = merge(adapter, tmp_path / "merged", trained_on=settings(), into="original")
    same(tmp_path / "merged", tmp_path / "wanted")
    assert result.plan.trained_on is not None and result.plan.count("dequantize") == 0


def test_linear_layers_that_are_not_targeted_are_as_training_saw_them(plain: Path, tmp_path: Path) -> None:
    adapter = adapter_for(plain, tmp_path / "adapter")
    name = drop_modules(adapter, "down_proj")
    plan = plan_merge(adapter, trained_on=settings())
    actions = {tensor.name: tensor.action for tensor in plan.tensors}
    assert name and all(actions[one] == "dequantize" for one in name)
    assert actions["lm_head.weight"] == actions["model.embed_tokens.weight"] == "copy"


def drop_modules(adapter: Path, kind: str) -> list[str]:
    """Take the modules of a kind out of an adapter; the names of their weights."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone = [name for name in tensors if kind in name]
    save_file(
        {name: value for name, value in tensors.items() if name not in gone}, adapter / "adapter_model.safetensors"
    )
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = [name for name in config["target_modules"] if name != kind]
    path.write_text(json.dumps(config))
    return [name.removeprefix("base_model.model.").replace("lora_A.", "") for name in gone if "lora_A" in name]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_model_that_was_loaded_in_another_dtype_is_quantized_in_it(dtype: str, tmp_path: Path) -> None:
    """The result is in the dtype that the base is stored in, rounded once."""
    base = plain_model(tmp_path / "base", "float32")
    adapter = adapter_for(base, tmp_path / "adapter")
    asked = settings(double_quant=False, dtype=dtype)
    seen = as_loaded(base, tmp_path / "seen", asked, dtype)
    merge(adapter, tmp_path / "wanted", base=seen, trained_on="unquantized", dtype="float32")
    merge(adapter, tmp_path / "merged", trained_on=asked)
    same(tmp_path / "merged", tmp_path / "wanted")


def test_tied_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(tmp_path / "b")
    adapter = adapter_for(tmp_path / "b", tmp_path / "adapter")
    asked = settings(double_quant=False)
    seen = as_loaded(tmp_path / "b", tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen)
    merge(adapter, tmp_path / "merged", trained_on=asked)
    same(tmp_path / "merged", tmp_path / "wanted")


def test_a_fused_weight_is_quantized_as_it_is_run(tmp_path: Path) -> None:
    """Phi-3 has q, k and v, and gate and up, in one layer each, on the disk and at work."""
    torch.manual_seed(0)
    config = Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    asked = settings(double_quant=False)
    seen = as_loaded(tmp_path / "base", tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen)
    merge(adapter, tmp_path / "merged", trained_on=asked)
    same(tmp_path / "merged", tmp_path / "wanted")


def test_repeated_layers_have_the_quantized_weights_of_the_old_ones(plain: Path, tmp_path: Path) -> None:
    asked = settings(double_quant=False)
    seen = as_loaded(plain, tmp_path / "seen", asked)
    model = AutoModelForCausalLM.from_pretrained(plain)
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "wanted", base=seen)
    merge(tmp_path / "adapter", tmp_path / "merged", base=plain, trained_on=asked)
    same(tmp_path / "merged", tmp_path / "wanted")


@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_that_lie_the_other_way_round_are_quantized_as_they_are_run(double_quant: bool, tmp_path: Path) -> None:
    """GPT-2's are quantized as (out, in), and stored as (in, out)."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, n_layer=2, n_head=2, vocab_size=64)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    drop_modules(adapter, "c_fc")
    asked = settings(double_quant=double_quant)
    seen = as_loaded(tmp_path / "base", tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen)
    result = merge(adapter, tmp_path / "merged", trained_on=asked)
    assert result.plan.count("dequantize") == 2 and result.ratios.keys() == {"c_attn", "c_proj"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wanted"))
    wrong = sum(int((ours[name] != value).sum()) for name, value in theirs.items())
    assert wrong < 100 if double_quant else wrong == 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"trained_on": "nf4"}, "double quantization.*--bnb-4bit-use-double-quant"),
        ({"trained_on": "int3"}, "trained_on is 'int3', expected auto, unquantized, nf4"),
        ({"trained_on": {"load_in_4bit": True}}, "does not say how"),
        ({"trained_on": {"bits": 4, "quant_method": "gptq"}}, "as gptq, which cannot be made"),
        ({"trained_on": settings(bnb_4bit_blocksize=100)}, "blocks of 100, expected 32, 64"),
        ({"into": "somewhere"}, "into is 'somewhere', expected trained or original"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], match: str, adapter: Path) -> None:
    with pytest.raises(MergeError, match=match):
        plan_merge(adapter, **given)


def test_adapters_of_different_quantizations_have_no_base_in_common(plain: Path, adapter: Path, tmp_path: Path) -> None:
    other = adapter_for(plain, tmp_path / "other")
    (adapter / "README.md").write_text(card(settings()))
    assert any(str(other) in line and "nothing says" in line for line in plan_merge([adapter, other]).warnings)
    (other / "README.md").write_text(card(settings("int8")))
    with pytest.raises(MergeError, match=r"was trained on nf4 with double quantization, .*other on int8; no base is"):
        plan_merge([adapter, other])
    for more in ({"trained_on": "unquantized"}, {"trained_on": settings()}):
        plan_merge([adapter, other], **more)


def test_a_quantized_base_is_what_training_saw_or_not(adapter: Path, tmp_path: Path) -> None:
    quantized, _ = fp8_folder(tmp_path / "fp8")
    (adapter / "README.md").write_text(card(settings()))
    with pytest.raises(MergeError, match=r"is stored as fp8, and training saw nf4 .*--base, or choose --into original"):
        plan_merge(adapter, quantized)
    plan_merge(adapter, quantized, into="original")
    (adapter / "README.md").unlink()
    assert not plan_merge(adapter, quantized).warnings


def test_the_command_has_the_words_of_the_trainer(plain: Path, adapter: Path, tmp_path: Path) -> None:
    asked = ["--trained-on", "nf4", "--no-bnb-4bit-use-double-quant", "--bnb-4bit-compute-dtype", "bfloat16"]
    asked += ["--bnb-4bit-blocksize", "128", "--llm-int8-skip-modules", "q_proj, lm_head"]
    result = run("merge", adapter, "-o", tmp_path / "merged", *asked)
    assert result.exit_code == 0, result.output
    assert "nf4 (as was said); added to the base as training saw it" in result.output
    assert "times the update (most in " in result.output
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())["trained_on"]
    assert record == {
        "kind": "nf4",
        "block_size": 128,
        "double_quant": False,
        "compute_dtype": "bfloat16",
        "skip_modules": ["q_proj", "lm_head"],
        "found_in": "as was said",
    }
    assert run("merge", adapter, "--dry-run", "--bnb-4bit-compute-dtype", "float16").exit_code == 2
    assert run("merge", adapter, "--dry-run", "--trained-on", "int8", "--bnb-4bit-blocksize", "64").exit_code == 2
    refused(run("merge", adapter, "--dry-run", "--trained-on", "nf4"), "--bnb-4bit-use-double-quant")


def test_experts_are_quantized_if_the_training_had_them_as_modules(tmp_path: Path) -> None:
    """transformers 5 runs them as parameters of three dimensions, which bitsandbytes leaves alone."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1, "moe_intermediate_size": 64, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen3MoeConfig(**sizes, head_dim=64, mlp_only_layers=[], decoder_sparse_step=1)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    asked = settings(double_quant=False)
    seen = as_loaded(tmp_path / "base", tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen)
    result = merge(adapter, tmp_path / "merged", trained_on=asked)
    same(tmp_path / "merged", tmp_path / "wanted")
    assert sum("its experts are taken to be" in line for line in result.warnings) == 1

    path = adapter / "adapter_model.safetensors"
    expert = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    more = {f"{expert}.lora_A.weight": torch.ones(4, 256), f"{expert}.lora_B.weight": torch.ones(64, 4)}
    save_file(load_file(path) | more, path)
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    plan = plan_merge(adapter, trained_on=asked)
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert {name for name in plan.seen.tensors if "experts" in name} == {
        f"model.layers.0.mlp.experts.{number}.{kind}.weight" for number in (0, 1) for kind in kinds
    }
    without = plan_merge(adapter, trained_on=asked | {"llm_int8_skip_modules": ["lm_head", "up_proj"]}).seen.tensors
    assert {name.split(".")[-2] for name in without if "experts" in name} == {"gate_proj", "down_proj"}
    assert not any("its experts" in line for line in plan.warnings)


def test_a_guess_at_the_dtype_that_the_model_was_loaded_in_is_told(plain: Path, adapter: Path, tmp_path: Path) -> None:
    """A weight of float16 that is rounded to bfloat16 first is quantized to other values."""
    (adapter / "README.md").write_text(card(settings()))
    assert not any("taken to have been loaded" in line for line in plan_merge(adapter).warnings)
    base = tmp_path / "half"
    base.mkdir()
    tensors = {name: tensor.half() for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    plan = plan_merge(adapter, base)
    assert plan.trained_on is not None and plan.trained_on.compute_dtype == "BF16"
    assert any("stored as float16, and taken to have been loaded as bfloat16" in line for line in plan.warnings)
    plan = plan_merge(adapter, base, trained_on=settings(dtype="float32"))
    assert plan.trained_on is not None and plan.trained_on.compute_dtype == "F16" and not plan.warnings
