"""GGUF files of LoRAs, read back and held against PEFT's update by llama.cpp's own rule: alpha / r of each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter
from gguf_tools import GROUPS, HEADS, Array, Case, gguf_name, in_order, make_kind, refused, tensors, without_head
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fossil_export import convert

SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "alpha": ({"lora_alpha": 13, "r": 6}, True),
    "rslora": ({"lora_alpha": 12, "r": 16, "use_rslora": True}, True),
    "rslora of rank 6": ({"lora_alpha": 12, "r": 6, "use_rslora": True}, False),
    "ranks": ({"lora_alpha": 13, "rank_pattern": {"q_proj": 4, "up_proj": 3}}, True),
    "alphas": ({"alpha_pattern": {"k_proj": 2, "v_proj": 32}}, True),
    "alphas of 3": ({"alpha_pattern": {"k_proj": 3}}, False),
    "no scale at all": ({"lora_alpha": 0}, True),
}


def made(folder: Path, family: str, **config: Any) -> Case:
    base = make_kind(folder / "base", family, **config.pop("config", {}))
    return Case(base, folder / "adapter", make_adapter(folder / "adapter", base, kind=LoraConfig, **config))


def product(path: Path, name: str) -> Array:
    """What llama.cpp adds to the weight `name`: alpha, if it is not 0, over the columns of lora_b, times B A."""
    found = tensors(path)
    alpha = gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()
    first, second = (found[f"{name}.{end}"][2].astype(np.float64) for end in ("lora_a", "lora_b"))
    scale = alpha / second.shape[1] if alpha else 1.0
    # llama.cpp looks rows of lora_a up for the embedding, and multiplies by lora_b.
    return scale * (first @ second.T) if name == "token_embd.weight" else scale * (second @ first)


def updates(case: Case) -> dict[str, Array]:
    named = case.trained.to(torch.float64).base_model.model.named_modules()
    return {name: m.get_delta_weight("default").detach().numpy() for name, m in named if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_alpha_over_rank_of_every_tensor_is_the_scale(name: str, tmp_path: Path) -> None:
    config, exact = SETTINGS[name]
    case = made(tmp_path, "llama", **config)
    details = case.write(tmp_path / "out.gguf")
    for module, update in updates(case).items():
        found = in_order(product(tmp_path / "out.gguf", gguf_name(module)), module, True)
        error = np.abs(found - update).max() / max(np.abs(update).max(), 1e-30)
        assert error < (1e-14 if exact else 2e-7), module
    assert details["exact"] is exact and (exact or 0 < details["relative_error"] < 1e-7)
    assert any("rounded to f32" in line for line in details["warnings"]) is not exact
    assert details["rank"] == config.get("r", 8)
    about = gguf.GGUFReader(tmp_path / "out.gguf").fields["general.description"].contents()
    assert about.startswith("LoRA adapter (LORA, lora, r = ")


def test_tensors_of_one_alpha_stay_to_the_bit(tmp_path: Path) -> None:
    case = made(tmp_path, "qwen2", **{"r": 6, "lora_alpha": 13})
    case.write(tmp_path / "out.gguf")
    found, trained = tensors(tmp_path / "out.gguf"), load_file(case.adapter / "adapter_model.safetensors")
    for name, value in trained.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        end = "lora_a" if "lora_A" in name else "lora_b"
        assert np.array_equal(found[f"{gguf_name(module)}.{end}"][2], value.numpy())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_embedding(family: str, tmp_path: Path) -> None:
    """Of Gemma the embedding is scaled after both, here and there."""
    config = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 16, "alpha_pattern": {"embed_tokens": 2}}
    case = made(tmp_path, family, **{**config, "config": {"tie_word_embeddings": False}})
    refused(r"whole trained tensors \(model.embed_tokens.weight\).*save_embedding_layers=False", case, tmp_path)
    without_head(case)
    assert case.write(tmp_path / "out.gguf")["exact"]
    found = tensors(tmp_path / "out.gguf")
    assert found["token_embd.weight.lora_a"][1] == (120, 8) and found["token_embd.weight.lora_b"][1] == (48, 8)
    update = updates(case)["model.embed_tokens"]
    assert np.abs(product(tmp_path / "out.gguf", "token_embd.weight") - update).max() < 1e-14


def test_embedding_that_is_the_head_too(tmp_path: Path) -> None:
    case = made(tmp_path, "gemma", **{"target_modules": ["embed_tokens"]})
    without_head(case)
    refused("ties the head to model.embed_tokens, and llama.cpp would take its LoRA for the head too", case, tmp_path)


def test_biases(tmp_path: Path) -> None:
    case = made(tmp_path, "qwen2", **{"target_modules": ["q_proj"], "lora_bias": True})
    refused(
        r"changes biases \(lora_bias of .*q_proj.bias.*\), for which a LoRA of llama.cpp has no place", case, tmp_path
    )


def test_head_of_its_own(tmp_path: Path) -> None:
    case = made(tmp_path, "llama", **{"target_modules": ["lm_head"], "lora_alpha": 3})
    without_head(case)
    case.write(tmp_path / "out.gguf")
    assert np.abs(product(tmp_path / "out.gguf", "output.weight") - updates(case)["lm_head"]).max() < 1e-14


@pytest.mark.parametrize(("value", "outtype"), [(1e30, "f16"), (3e38, "f32")])
def test_more_than_a_format_holds(value: float, outtype: str, tmp_path: Path) -> None:
    case = made(
        tmp_path, "llama", **{"target_modules": ["q_proj", "v_proj", "o_proj"], "alpha_pattern": {"o_proj": 16}}
    )
    file = case.adapter / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"][2, 2] = value
    save_file(state, file)
    remedy = "use --outtype f32" if outtype == "f16" else "merge it"
    refused(f"o_proj holds .*, more than {outtype} can; {remedy}", case, tmp_path, outtype=outtype)


def test_rounded_matrices_are_told_of_both(tmp_path: Path) -> None:
    """A is trained too, and is rounded as B is."""
    case = made(tmp_path, "llama", **{"target_modules": ["q_proj"], "r": 32})
    file = case.adapter / "adapter_model.safetensors"
    state = {name: value.half().float() if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(
        {name: value.bfloat16().float() * 4 if "lora_B" in name else value for name, value in state.items()}, file
    )
    assert case.write(tmp_path / "out.gguf", outtype="f16")["relative_error"] > 1e-5


def test_the_lora_of_a_smaller_rank_goes_on_to_gguf(tmp_path: Path) -> None:
    case = made(tmp_path, "llama", **{"target_modules": ["q_proj", "k_proj"]})
    cut = convert(case.adapter, tmp_path / "lora", to="lora", rank=2, base=case.base)
    edit_json(cut.output / "adapter_config.json", base_model_name_or_path=str(case.base))
    convert(cut.output, tmp_path / "out.gguf", to="gguf-lora")
    state = load_file(cut.output / "adapter_model.safetensors")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"):
        first, second = (state[f"base_model.model.{module}.lora_{end}.weight"].double().numpy() for end in "AB")
        found = in_order(product(tmp_path / "out.gguf", gguf_name(module)), module, True)
        assert np.array_equal(found, second @ first) and len(second) in {16 * HEADS, 16 * GROUPS}
