"""A LoRA that was converted to a LoRA is verified, to the last bit of each value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, make_base
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fossil_export import convert, verify

PREFIX = "base_model.model."
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 13}


class TestVerifyCatches:
    @pytest.fixture
    def lora(self, base: Path, tmp_path: Path) -> Path:
        config = {"lora_alpha": 13, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 4}}
        targets = {"target_modules": ["embed_tokens", "q_proj", "v_proj"]}
        make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **config, **targets)
        return convert(tmp_path / "adapter", tmp_path / "lora", to="lora").output

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("model.layers.1.self_attn.v_proj.lora_B.weight", "v_proj: its lora_B is not the trained"),
            ("model.layers.1.self_attn.v_proj.lora_A.weight", "v_proj: its lora_A does not"),
            ("model.layers.0.self_attn.q_proj.lora_B.weight", "q_proj: its lora_B is not the trained"),
            ("model.embed_tokens.lora_embedding_A", "embed_tokens: its lora_A does not"),
            ("model.embed_tokens.lora_embedding_B", "embed_tokens: its lora_B is not the trained"),
        ],
    )
    def test_the_last_bit_of_one_value(self, name: str, said: str, lora: Path) -> None:
        file = lora / "adapter_model.safetensors"
        state = load_file(file)
        values = state[PREFIX + name].view(-1)
        values[7] = torch.nextafter(values[7], torch.tensor(torch.inf))
        save_file(state, file)
        (problem,) = verify(lora, level="weights").problems
        assert said in problem

    @pytest.mark.parametrize(
        "change",
        [{"lora_alpha": 27}, {"use_rslora": True}, {"alpha_pattern": {}}, {"alpha_pattern": {"q_proj": 1}}],
    )
    def test_another_scale(self, change: dict[str, Any], lora: Path) -> None:
        assert verify(lora, level="weights").parity
        edit_json(lora / "adapter_config.json", **change)
        found = verify(lora, level="weights")
        assert not found.parity and any("its update would be scaled" in problem for problem in found.problems)

    def test_modules_that_nothing_names(self, lora: Path) -> None:
        """PEFT would guess them by the model's type, and leave the others out."""
        edit_json(lora / "adapter_config.json", target_modules=None)
        assert "names no target_modules" in verify(lora, level="weights").problems[0]

    @pytest.mark.parametrize("part", ["lora_A", "lora_B"])
    def test_matrices_that_are_none(self, part: str, lora: Path) -> None:
        state = load_file(lora / "adapter_model.safetensors")
        name = f"{PREFIX}model.layers.1.self_attn.v_proj.{part}.weight"
        state[name] = state[name].reshape(-1)
        save_file(state, lora / "adapter_model.safetensors")
        assert "do not fit" in verify(lora, level="weights").problems[0]

    def test_another_rank(self, lora: Path) -> None:
        edit_json(lora / "adapter_config.json", rank_pattern={})
        assert "q_proj: has rank 4, and adapter_config.json says otherwise" in verify(lora, level="weights").problems[0]


def test_the_folder_answers_as_the_trained_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **EMBEDDING)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\n")
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    assert made.details["exact"] and verify(made.output, prompts=prompts).parity
