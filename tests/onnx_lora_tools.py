"""The small models of `graphs` with a LoRA that PEFT made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphs import Case, Stack, make_case
from peft import LoraConfig, get_peft_model

from fossil_export import load_adapter
from fossil_export.verifying._shards import check_shards

MODES = ["merged", "tiled", "fused", "swappable"]
OUTPUTS = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
X = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
PATTERNS: dict[str, Any] = {
    "lora_alpha": 13,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3, r"layers\.1\.v_proj": 7},
    "alpha_pattern": {"v_proj": 5},
}
"""Scales that no float32 is, and another rank in each layer of a packed weight."""


def lora_case(
    folder: Path,
    name: str = "lora",
    seed: int = 0,
    inputs: int = 24,
    outputs: dict[str, int] | None = None,
    **config: Any,
) -> Case:
    """The model of `make_case`, with a LoRA that PEFT made and saved, every value of it moved."""
    outputs = outputs or OUTPUTS
    case = make_case(folder, inputs, outputs, rank=1, adapter="tile of rank 1")
    copy = Stack(inputs, outputs, 2, False).eval()
    copy.load_state_dict(case.plain.state_dict())
    config = {"r": 4, "target_modules": list(outputs)} | config
    trained = get_peft_model(copy, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in trained.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    trained.save_pretrained(folder / name)
    return Case(case.base, folder / name, trained, case.plain)


def problems(result: Any, adapter: Path) -> list[str]:
    return check_shards(result.output, load_adapter(adapter))
