"""The smaller methods of PEFT are merged as its live models have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_adapter
from tuner_tools import judge, noise

from fossil_export import load_adapter
from fossil_export.errors import AdapterError

CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "HiRA": (peft.HiraConfig, True, {}),
    "HiRA with ranks": (peft.HiraConfig, True, {"rank_pattern": {"q_proj": 3}}),
    "C3A": (peft.C3AConfig, False, {"block_size": 24}),
    "C3A with sizes": (peft.C3AConfig, False, {"block_size": 12, "block_size_pattern": {"q_proj": 48}}),
    "DeLoRA": (peft.DeloraConfig, False, {}),
    "DeLoRA with ranks": (peft.DeloraConfig, False, {"rank_pattern": {"q_proj": 3}, "lambda_pattern": {"q_proj": 2}}),
    "GraLoRA": (peft.GraloraConfig, False, {"r": 8, "gralora_k": 4, "alpha": 5}),
    "GraLoRA with a LoRA": (peft.GraloraConfig, False, {"r": 6, "gralora_k": 2, "hybrid_r": 3}),
    "RandLoRA": (peft.RandLoraConfig, True, {"r": 7, "randlora_alpha": 11}),
    "sparse RandLoRA": (peft.RandLoraConfig, True, {"r": 8, "randlora_alpha": 16, "sparse": True}),
    "DEFT": (peft.DeftConfig, False, {"r": 4}),
    "DEFT, orthogonal": (peft.DeftConfig, False, {"r": 4, "decomposition_method": "qr", "alpha": 3}),
    "DEFT that only takes away": (peft.DeftConfig, False, {"r": 4, "para": True}),
    "PVeRA": (peft.PveraConfig, True, {"r": 6}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_it_answers_as_trained(name: str, base: Path, tmp_path: Path) -> None:
    kind, bits, config = CASES[name]
    judge(tmp_path, base, kind, bits=bits, **config)


def test_hira_of_an_embedding_answers_as_trained(base: Path, tmp_path: Path) -> None:
    judge(tmp_path, base, peft.HiraConfig, target_modules=["embed_tokens"], modules=1)


def test_beft_adds_to_the_biases_that_a_model_has(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    judge(tmp_path, tmp_path / "base", peft.BeftConfig, target_modules=["q_proj", "v_proj"])


def test_pvera_that_draws_its_update_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "pvera", base, noise, kind=peft.PveraConfig, sample_at_inference=True)
    with pytest.raises(AdapterError, match="drawn anew in each pass; set it to false"):
        load_adapter(tmp_path / "pvera")
