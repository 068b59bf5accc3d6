"""However a model's weights lie in quantized files, a merge is that into the dequantized ones, byte for byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_tools import Spot, in_slabs, make, put
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import MissConfig
from places_tools import SMALL, saved, scene
from quantized_mxfp4 import assert_same_merge, stored_as
from safetensors.torch import load_file, save_file
from test_target_parameters import BY_EXPERT, CASES, EXPERTS, qwen3_vl
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from fossil_export import merge, verify
from fossil_export.checkpoints.layouts import Order

BLOCK = (12, 20)
"""Divides hardly any of the sizes, so that most weights end in blocks that are cut."""


def quantized(base: Path, folder: Path, block: tuple[int, int] = BLOCK) -> Path:
    """All weights of a base in block-scaled fp8, but embeddings, heads and vectors; the base gets what these stand
    for."""
    (file,) = base.glob("*.safetensors")
    plain = {name: value.bfloat16() for name, value in load_file(file).items()}
    stored = dict(plain)
    for name, value in plain.items():
        if value.ndim < 2 or any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
            continue
        rows, columns = (-(-size // one) for size, one in zip(value.shape[-2:], block, strict=True))
        scales = torch.rand(*value.shape[:-2], rows, columns) * 1e-3 + 1e-3
        wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
        wide = wide[..., : value.shape[-2], : value.shape[-1]]
        stored[name] = (value.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        plain[name] = (stored[name].float() * wide).bfloat16()
    assert any(name.endswith("_scale_inv") for name in stored)
    save_file(plain, file, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    return stored_as(folder, base, stored, {"quant_method": "fp8", "weight_block_size": list(block)})


def check(model: Any, folder: Path, original: bool = False, kind: Any = None, turn: Any = None, **config: Any) -> None:
    base = saved(model, folder, save_original_format=original)
    if turn is not None:
        (file,) = base.glob("*.safetensors")
        save_file(turn(load_file(file)), file, {"format": "pt"})
    stored = quantized(base, folder / "quantized")
    found = scene(folder, model, **({} if kind is None else {"kind": kind}), **config)
    assert_same_merge(found.adapter, stored, base, folder)


@pytest.mark.parametrize("name", list(CASES))
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    check(make(), tmp_path, **{"target_modules": [], **config})


@pytest.mark.parametrize("name", BY_EXPERT)
def test_experts_one_by_one_of_which_the_class_makes_one_tensor(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    check(make(), tmp_path, original=True, **{"target_modules": [], **config})


def test_experts_that_the_files_hold_transposed(tmp_path: Path) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: value.transpose(1, 2).contiguous() if "mlp.experts" in name else value
            for name, value in tensors.items()
        }

    check(qwen3_vl(20), tmp_path, turn=turn, target_modules=[], target_parameters=EXPERTS)


def deepseek() -> Any:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL | sizes | experts | {"num_key_value_heads": 4},
            moe_intermediate_size=20, first_k_dense_replace=1, n_shared_experts=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": EXPERTS, "target_modules": ["o_proj"]},
        {"target_modules": ["q_a_proj", "kv_b_proj", "down_proj"]},
        {"kind": MissConfig, "r": 4, "target_modules": ["q_b_proj", "gate_proj", "o_proj"]},
    ],
)
def test_deepseek(original: bool, config: dict[str, Any], tmp_path: Path) -> None:
    check(deepseek(), tmp_path, original, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
        {"kind": MissConfig, "r": 4, "target_modules": ["qkv_proj", "o_proj"]},
        {"target_modules": ["qkv_proj"], "modules_to_save": ["down_proj"]},
        {"target_modules": ["qkv_proj"], "use_dora": True},
    ],
)
def test_packed_projections(config: dict[str, Any], tmp_path: Path) -> None:
    check(Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)), tmp_path, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["c_fc"], "use_dora": True},
        {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]},
    ],
)
def test_layers_that_are_stored_inputs_first(config: dict[str, Any], tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))
    check(model, tmp_path, fan_in_fan_out=True, **config)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    """A tensor of parts that lie one after another, in several orders of rows, with what an adapter has of each."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        inner, outer, groups = (draw(st.integers(1, 4)) for _ in range(3))
        order = Order(groups, outer, inner) if draw(st.booleans()) else None
        found.append((groups * outer * inner, draw(st.integers(0, 3)), order, draw(st.sampled_from(["", "s", "p"]))))
    return {
        "parts": found,
        "width": draw(st.integers(4, 50)),
        "block": draw(st.tuples(st.integers(1, 9), st.integers(1, 40))),
        "cast": draw(st.sampled_from(["auto", "float32", "float16"])),
        "slab": draw(st.sampled_from([512, 4096, 1 << 22])),
        "decoded": draw(st.sampled_from([64, 1 << 19])),
    }


@settings(max_examples=30, deadline=None)
@given(parts(), st.integers(0, 999))
def test_any_part_of_a_coded_tensor(case: dict[str, Any], seed: int) -> None:
    """Shards (s) and whole weights (p) go into codes as into the floats that these stand for, cut anywhere."""
    torch.manual_seed(seed)
    width, first, held, spots = case["width"], 0, {}, {}
    for number, (rows, gap, order, done) in enumerate(case["parts"]):
        first += gap
        spots[f"m{number}.weight"] = Spot("whole", first, rows, order)
        if done == "s":
            held[f"m{number}.miss_block"] = torch.randn(2, rows)
        elif done == "p":
            held[f"m{number}.weight"] = torch.randn(rows, width)
        first += rows
    spots["other.weight"] = Spot("turned", number=1)
    held["other.miss_block"] = torch.randn(2, width)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        stored = {"whole": torch.randn(first, width), "turned": torch.randn(3, 7, width), "gone": torch.randn(2, 5, 6)}
        adapter = make(folder, stored, held)
        (folder / "base" / "config.json").write_text('{"dtype": "bfloat16"}')  # no class, which takes long to make
        coded = quantized(folder / "base", folder / "coded", case["block"])
        put(patch, spots)
        in_slabs(patch, case["slab"])
        patch.setattr("fossil_export.checkpoints._coding.BLOCK", case["decoded"])
        ours, wanted = (folder / "ours", folder / "wanted")
        merge(adapter, ours, base=coded, dtype=case["cast"])
        merge(adapter, wanted, base=folder / "base", dtype=case["cast"])
        found, truth = load_file(ours / "model.safetensors"), load_file(wanted / "model.safetensors")
        assert found.keys() == truth.keys() == stored.keys()
        before = load_file(folder / "base" / "model.safetensors")
        assert not torch.equal(truth["turned"], before["turned"].to(truth["turned"].dtype))
        for name, value in truth.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert verify(ours, adapter=adapter, base=coded, level="weights").parity
