"""The nearest LoRA of an adapter: on layers with short sides, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter, weights
from peft import LoHaConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuner_tools import logits

from fossil_export import convert, verify


def double(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).double().eval()


@pytest.mark.parametrize(
    "config",
    [{"kind": LoHaConfig, "alpha": 3}, {"kind": LoraConfig, "use_dora": True}, {"init_weights": "bat"}],
    ids=["loha", "dora", "bat"],
)
def test_a_layer_with_a_short_side_gets_no_larger_rank(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    # All ranks of q_proj, 48, are more than k_proj, whose shorter side is 24, has.
    make_adapter(tmp_path / "adapter", base, **{**config, "target_modules": ["q_proj", "k_proj"]})
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", energy=1 - 1e-12)
    ranks = {name.split(".")[-3]: len(value) for name, value in weights(made.output).items() if "lora_A" in name}
    assert ranks == {"q_proj": 48, "k_proj": 24} and made.details["rank"] == 48
    found, wanted = logits(double(base, made.output)), logits(double(base, tmp_path / "adapter"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_what_was_cut_is_not_said_to_be_as_it_was(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig)
    said = "its tensors are as they were"
    whole, cut = (convert(tmp_path / "adapter", tmp_path / f"{rank}", to="lora", rank=rank) for rank in (None, 4))
    assert any(said in warning for warning in whole.warnings)
    assert not any(said in warning for warning in cut.warnings)


@pytest.mark.parametrize(
    "config",
    [{"kind": LoHaConfig}, {"kind": LoraConfig, "use_dora": True}, {"kind": LoraConfig, "init_lora_weights": "pissa"}],
    ids=["loha", "dora", "pissa"],
)
def test_verify_measures_how_far_it_is_from_what_was_trained(
    config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, **{**config, "target_modules": ["q_proj", "down_proj"]})
    near = convert(tmp_path / "adapter", tmp_path / "near", to="lora", rank=12)
    (problem,) = verify(near.output, level="weights").problems
    worst = max(near.details["relative_error_by_module"].values())
    assert f"off, by up to {worst:.2g} of what was trained" in problem
    assert "as the nearest LoRA is" in problem
    whole = convert(tmp_path / "adapter", tmp_path / "whole", to="lora", rank=48)  # as many as the update can have
    assert verify(whole.output, level="weights").parity
    file = whole.output / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 0] += 0.001
    save_file(state, file)
    (problem,) = verify(whole.output, level="weights").problems
    assert problem.startswith("model.layers.1.self_attn.q_proj are off")
