"""Exits other than a merge, on a quantized base: as on the dequantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig
from quantized_bases import fp8_folder
from quantized_bnb import bnb_folder
from quantized_mxfp4 import trained
from safetensors.torch import load_file, save_file

from fossil_export import convert, merge, plan_merge, verify
from fossil_export.errors import MergeError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return fp8_folder(tmp_path_factory.mktemp("exits"))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
        MissConfig(r=4, init_weights="bat", target_modules=["q_proj"]),
    ],
    ids=["dora", "bat"],
)
def test_the_nearest_lora_of_an_update_that_depends_on_the_weights(
    config: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = trained(folders[1], tmp_path / "adapter", config)
    found, wanted = (convert(adapter, tmp_path / one.name, to="lora", base=one, rank=2) for one in folders)
    wanted_tensors = load_file(wanted.output / "adapter_model.safetensors")
    for name, value in load_file(found.output / "adapter_model.safetensors").items():
        assert torch.equal(value, wanted_tensors[name])
    said = [
        verify(one.output, adapter=adapter, base=base, level="weights").problems
        for one, base in zip((found, wanted), folders, strict=True)
    ]
    assert len(said[0]) == 1 and said[0] == said[1]


def test_a_weight_that_is_not_finite_as_floats_is_refused_though_nothing_is_added_to_it(tmp_path: Path) -> None:
    quantized, dequantized = fp8_folder(tmp_path)
    adapter = trained(dequantized, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"][0, 0] = 3e38
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=f"{name} holds infinite or NaN values"):
        merge(adapter, tmp_path / "out", base=quantized)
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_codes_that_are_stored_as_the_models_own_dtype(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`, as for FSDP."""
    quantized, dequantized = bnb_folder(tmp_path, "nf4", storage="bfloat16")
    adapter = trained(dequantized, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    plan = plan_merge(adapter, quantized)
    assert (plan.count("merge"), plan.count("dequantize"), plan.count("copy")) == (2, 12, 7)
