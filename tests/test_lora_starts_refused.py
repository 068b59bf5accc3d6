"""LoRA that began from another weight than the base's: what is refused, and what is a plain LoRA after all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lora_start_tools
import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base, peft_merged, randomise, weights
from lora_start_tools import STARTS, answers, apart, gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verify_tools import tamper

from fossil_export import load_adapter, merge
from fossil_export.errors import AdapterError, MergeError, MissingExtraError

one_thread = lora_start_tools.one_thread


def test_olora_of_gpt2s_layers_is_refused_because_peft_turns_them_round(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["attn.c_proj"], **STARTS["olora"])
    with pytest.raises(MergeError, match="wrong way round"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_a_base_of_float64_is_refused_as_peft_refuses_it(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"], **STARTS["pissa"])
    wide = make_base(tmp_path / "wide", torch.float64)
    with pytest.raises(MergeError, match="cannot begin from a weight of F64"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=wide)
    model = AutoModelForCausalLM.from_pretrained(wide, dtype="auto")
    with pytest.raises(TypeError):
        PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_two_equal_singular_values_do_not_tell_where_it_began(tmp_path: Path, base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tamper(base, name, lambda old: torch.eye(48))
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"], **STARTS["pissa"])
    with pytest.raises(MergeError, match="too close to tell where pissa began"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_it_needs_pytorch_and_says_so(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"], **STARTS["pissa"])
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match="merging pissa needs torch"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_other_starts_are_refused_and_the_line_says_how_to_convert_them(start: str, tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"'{start}'.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_plain_loras(start: Any, tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, init_lora_weights=start, target_modules=QV)
    assert load_adapter(tmp_path / "adapter").variant == "lora"
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(tmp_path / "merged").items())


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}]
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_converted_is_a_plain_lora_of_the_base(
    start: str, more: dict[str, Any], tmp_path: Path, base: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, LoraConfig(r=8, target_modules=QV, **STARTS[start], **more))
        trained.peft_config["default"].init_lora_weights = True
        trained.save_pretrained(tmp_path / "begin")
        trained.peft_config["default"].init_lora_weights = start
        randomise(trained)
        path = str(tmp_path / "begin")
        trained.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=path)
    assert load_adapter(tmp_path / "adapter").variant == "lora"
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
    assert apart(answers(merged), answers(trained.double().eval())) < 1e-5


@pytest.mark.parametrize(
    "start, change, config, why",
    [
        ("pissa", "lora_B", {}, "lora_B is missing"),
        ("kasa", "lora_diag", {}, "lora_diag is missing"),
        ("kasa", None, {"kasa_config": None}, "has no kasa_config"),
        ("pissa", None, {"use_bdlora": {"nblocks": 2}}, "not understood together"),
        ("kasa", None, {"init_lora_weights": "pissa"}, "not understood together"),
        ("olora", None, {"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_halves_and_contradictions_are_refused(
    start: str, change: str | None, config: dict[str, Any], why: str, tmp_path: Path, base: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"], **STARTS[start])
    edit_json(tmp_path / "adapter" / "adapter_config.json", **config)
    if change is not None:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if change not in name}, path)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")
