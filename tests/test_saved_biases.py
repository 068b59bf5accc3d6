"""With bias="all" PEFT writes the biases within modules_to_save three times, by three names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import weights
from peft import LoraConfig
from safetensors.torch import save_file
from tuner_tools import assert_live, biased_base

from fossil_export import load_adapter
from fossil_export.errors import AdapterError

KEY = "base_model.model.model.layers.0.self_attn.modules_to_save.default.q_proj.bias"


def test_biases_within_a_saved_module_are_taken_once(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", torch.float64)
    config = {"kind": LoraConfig, "target_modules": ["up_proj"], "modules_to_save": ["self_attn"], "bias": "all"}
    after, before = assert_live(base, tmp_path, **config), weights(base)
    assert KEY in weights(tmp_path / "adapter")
    changed = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(after[changed], before[changed])

    tensors = weights(tmp_path / "adapter")
    tensors[KEY] = tensors[KEY][:-1].clone()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj\.bias twice"):
        load_adapter(tmp_path / "adapter")
