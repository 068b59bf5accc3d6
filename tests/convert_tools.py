"""Logits of models with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import weights
from peft import PeftModel
from transformers import AutoModelForCausalLM

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def with_lora(base: Path, folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PeftModel:
    model = PeftModel.from_pretrained(kind.from_pretrained(base, **options), folder)
    shards = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    stored = {name.rpartition(".lora_A")[0] for name in weights(folder) if ".lora_A." in name}
    assert shards == stored  # exactly the trained modules are hit
    return model
