"""AdaLoRA is what the live trained model computes, also where training dropped some or all of a module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LINEARS, edit_json, make_adapter, make_base, peft_merged, randomise, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verify_tools import flip, tamper

from fossil_export import convert, load_adapter, merge, verify
from fossil_export.errors import AdapterError
from fossil_export.merging._engine import NumpyEngine, TorchEngine, Update, merge_slab
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

TOKENS = torch.arange(20)[None]
SETTINGS: dict[str, Any] = {"kind": AdaLoraConfig, "init_r": 6, "target_r": 2, "total_step": 10, "lora_alpha": 13}


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(TOKENS).logits
    return found


def pruned(folder: Path, base: Path) -> torch.nn.Module:
    """Trained by PEFT with its own allocator of ranks, which leaves some modules nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = AdaLoraConfig(
        init_r=6, target_r=1, tinit=1, tfinal=2, deltaT=1, total_step=8, lora_alpha=13, target_modules=LINEARS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.05)
        for step in range(8):
            trained(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            trained.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        trained.save_pretrained(folder)
    return trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_merged_as_peft_merges_it_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    trained = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS, **SETTINGS)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert load_adapter(tmp_path / "adapter").variant == "adalora" and result.plan.count("merge") == 14
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", dtype)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert verify(tmp_path / "merged", level="weights").parity
    if dtype == torch.float32:
        merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        assert float((merged - answers(trained)).norm() / merged.norm()) < 1e-6


def test_what_training_dropped_is_dropped(tmp_path: Path, base: Path) -> None:
    trained = pruned(tmp_path / "adapter", base)
    ranks = {one.rank for one in load_adapter(tmp_path / "adapter").trained.values()}
    assert 0 in ranks and len(ranks) > 2
    merge(tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", torch.float32)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((merged - answers(trained)).norm() / merged.norm()) < 1e-6
    assert verify(tmp_path / "merged", level="weights").parity
    convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert float((answers(lora) - answers(trained)).norm() / merged.norm()) < 1e-6


def test_its_lora_is_exact(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **SETTINGS)
    assert convert(tmp_path / "adapter", tmp_path / "lora", to="lora").details["relative_error"] < 1e-7
    merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "lora", tmp_path / "other")
    ours = weights(tmp_path / "merged")
    for key, value in weights(tmp_path / "other").items():
        torch.testing.assert_close(value, ours[key], rtol=1e-5, atol=1e-7)


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.dtype, tuple[int, int], int, int, int]:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    return dtype, shape, draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_shape_rank_and_dtype_is_the_live_layer(case: tuple[torch.dtype, tuple[int, int], int, int, int]) -> None:
    dtype, shape, rank, alpha, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    inner = torch.nn.Linear(shape[1], shape[0], bias=False)
    inner.weight.data = weight.clone()
    layer = SVDLinear(inner, "default", AdaLoraConfig(total_step=10), r=rank, lora_alpha=alpha).float()
    arrays = {}
    for role in "ABE":
        value = getattr(layer, f"lora_{role}")["default"]
        value.data = torch.randn(value.shape, generator=generator)
        arrays[role] = value.data
    with torch.no_grad():
        want = layer.double()(torch.eye(shape[1], dtype=torch.float64)).T.numpy()
    shapes = {role: tuple(value.shape) for role, value in arrays.items()}
    config = {"init_r": rank, "lora_alpha": alpha, "peft_type": "ADALORA"}
    numbers = METHODS["adalora"].read(config, "a", shapes, "here")
    assert numbers is not None and METHODS["adalora"].mismatch(shapes, numbers, shape) is None
    exact = np.empty(shape)
    bound = EXACT["adalora"].rebuild(
        weight.double().numpy(), {role: value.double().numpy() for role, value in arrays.items()}, numbers, exact
    )
    np.testing.assert_allclose(exact, want, rtol=1e-6, atol=1e-9)
    assert bound is not None
    stored = weight.float().numpy() if dtype == torch.bfloat16 else weight.numpy()
    for engine in (NumpyEngine(), TorchEngine("cpu")):
        out = np.empty(shape, np.float32)
        part = {role: engine.widen(value.numpy(), "F32") for role, value in arrays.items()}
        merge_slab(engine, stored, out, [Update(METHODS["adalora"], part, numbers)], 0, shape[0])
        engine.close()
        assert (np.abs(out - exact) <= bound + np.abs(exact) * 2.0**-24).all()
    form = METHODS["adalora"].low_rank({r: v.numpy() for r, v in arrays.items()}, numbers, shape[0])
    assert form is not None
    np.testing.assert_allclose(
        weight.double().numpy() + form.up @ form.down_matrix(shape[1]), want, rtol=1e-4, atol=1e-4
    )


def test_one_wrong_bit_is_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, target_modules=["up_proj"], **SETTINGS)
    merge(tmp_path / "adapter", tmp_path / "merged")
    tamper(tmp_path / "merged", "model.layers.1.mlp.up_proj.weight", flip)
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert "up_proj.weight 1 of" in problem


def test_gpt2s_layers_are_merged(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=32)).save_pretrained(base)
    trained = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_fc"], **SETTINGS)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((merged - answers(trained)).norm() / merged.norm()) < 1e-6


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "config, change, why",
    [
        ({"init_r": 5}, None, "has rank 6, but the config says 5"),
        ({"rank_pattern": {f"{Q0}.lora_E": [True] * 5 + [False]}}, None, "has rank 6, but the config says 5"),
        ({"rank_pattern": {f"{Q0}.lora_E": [True] * 5}}, None, "rank_pattern has 5 values"),
        ({"rank_pattern": {f"{Q0}.lora_E": 5}}, None, "rank_pattern is"),
        ({"lora_alpha": 0}, None, "expected a positive number"),
        ({"use_dora": True}, None, "which AdaLoRA does not have"),
        ({"something_new": 1}, None, "does not understand"),
        ({}, "lora_E", "lora_E is missing"),
        ({}, "lora_B", "lora_B is missing"),
    ],
)
def test_halves_and_contradictions_are_refused(
    config: dict[str, Any], change: str | None, why: str, tmp_path: Path, base: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **SETTINGS)
    edit_json(tmp_path / "adapter" / "adapter_config.json", **config)
    if change is not None:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if change not in name}, path)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


def test_a_module_without_values_that_no_pattern_emptied_is_refused(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **SETTINGS)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = f"base_model.model.{Q0}"
    state |= {
        f"{name}.lora_A": torch.zeros(0, 48),
        f"{name}.lora_B": torch.zeros(48, 0),
        f"{name}.lora_E": torch.zeros(0, 1),
    }
    save_file(state, path)
    with pytest.raises(AdapterError, match="has rank 0, but the config says 6"):
        load_adapter(tmp_path / "adapter")


def test_two_of_them_are_added_up_as_peft_adds_them(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "one", base, target_modules=["q_proj"], **SETTINGS)
    make_adapter(
        tmp_path / "two", base, lambda m: (randomise(m), randomise(m))[0], target_modules=["q_proj"], **SETTINGS
    )
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged", weights=[0.5, 2.0])
    before = weights(base)
    for name, value in weights(tmp_path / "merged").items():
        parts = [peft_merged(base, tmp_path / which, torch.float32)[name] - before[name] for which in ("one", "two")]
        torch.testing.assert_close(value, before[name] + 0.5 * parts[0] + 2 * parts[1], rtol=1e-5, atol=1e-6)
