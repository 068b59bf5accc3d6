"""Exits other than a merge, on a quantized base: as on the dequantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig
from quantized_bases import fp8_folder
from quantized_mxfp4 import trained
from safetensors.torch import load_file

from fossil_export import convert, verify


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
