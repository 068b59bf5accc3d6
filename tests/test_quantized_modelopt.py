"""Bases of NVIDIA's ModelOpt, against what its code says and compressed-tensors, which reads the same NVFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_bases import fp8_folder, merged_equal
from quantized_scaled import MODULE, checkpoint, encoded, fp8_codes, same, scales, values
from safetensors.torch import load_file, save_file

from fossil_export.errors import CheckpointError

WEIGHT, SCALE = f"{MODULE}.weight", f"{MODULE}.weight_scale"
SETTINGS = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*router*"]}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize(
    "algorithm,shape,grid,block",
    [
        ("FP8", (8, 16), (), (8, 16)),
        ("FP8", (3, 8, 16), (3, 1, 1), (8, 16)),
        ("FP8_PER_CHANNEL_PER_TOKEN", (8, 16), (8,), (1, 16)),
        ("FP8_PB_WO", (256, 384), (2, 1, 3, 1), (128, 128)),
        ("FP8_PB_WO", (128, 384), (1, 3), (128, 128)),
    ],
)
def test_fp8_is_codes_times_float32_scales(algorithm: str, shape: Any, grid: Any, block: Any, tmp_path: Path) -> None:
    codes, own = fp8_codes(*shape), scales(*grid)
    passed = {f"{MODULE}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_proj.k_scale": torch.ones(())}
    opened = checkpoint(tmp_path, {WEIGHT: codes, SCALE: own} | passed, SETTINGS | {"quant_algo": algorithm})
    wide = own.reshape(*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])
    wide = wide.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    assert same(values(opened, WEIGHT), (codes.float() * wide).bfloat16())
    assert set(opened.tensors) == {WEIGHT}


def nvfp4() -> dict[str, torch.Tensor]:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    own = scales(4, 8).mul(100).to(torch.float8_e4m3fn)
    return {WEIGHT: packed, SCALE: own, f"{SCALE}_2": torch.tensor(0.000317)}


def test_nvfp4_has_scales_of_scales(tmp_path: Path) -> None:
    tensors = nvfp4()
    opened = checkpoint(tmp_path, tensors, SETTINGS | {"quant_algo": "NVFP4"})
    packed, own, overall = tensors.values()
    codes = E2M1[torch.stack([packed & 15, packed >> 4], -1).long()].reshape(4, 8, 16)
    truth = (codes * (own.float() * overall).unsqueeze(-1)).reshape(4, 128).bfloat16()
    assert same(values(opened, WEIGHT), truth)
    found = encoded(opened, WEIGHT, truth.float())
    again = checkpoint(tmp_path / "again", found, SETTINGS | {"quant_algo": "NVFP4"}, "float32")
    assert (values(again, WEIGHT) - truth.float()).norm() < 0.1 * truth.float().norm()


def test_compressed_tensors_converts_nvfp4_to_the_same(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    tensors = nvfp4() | {f"{SCALE}_2": torch.tensor(2.0**-11), f"{MODULE}.input_scale": torch.ones(())}
    opened = checkpoint(tmp_path, tensors, SETTINGS | {"quant_algo": "NVFP4"})
    own = {name.rpartition(".")[2]: one for name, one in ModelOptNvfp4Converter().process(dict(tensors)).items()}
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    truth = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(own, scheme)["weight"]
    assert same(values(opened, WEIGHT), truth)


def test_a_merge_of_a_base_with_a_quantization_file_of_its_own(tmp_path: Path) -> None:
    """hf_quant_config.json says how the base is quantized; the result is not, and does not have it."""
    quantized, _ = fp8_folder(tmp_path)
    tensors = {name: value for name, value in load_file(quantized / "model.safetensors").items() if "_inv" not in name}
    truth = dict(tensors)
    for name in [name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn]:
        tensors[f"{name}_scale"] = scales(1)[0]
        truth[name] = (tensors[name].float() * tensors[f"{name}_scale"]).bfloat16()
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    save_file(truth, tmp_path / "dequantized" / "model.safetensors", {"format": "pt"})
    (quantized / "config.json").write_bytes((tmp_path / "dequantized" / "config.json").read_bytes())
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (quantized / "hf_quant_config.json").write_text(json.dumps(own))
    merged_equal(quantized, tmp_path / "dequantized", tmp_path)
    assert not (tmp_path / "of_quantized" / "hf_quant_config.json").exists()


GOOD = {WEIGHT: fp8_codes(8, 16), SCALE: scales()}
WRONG = {
    "another algorithm": (GOOD, SETTINGS | {"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'"),
    "another algorithm of a layer": (
        GOOD,
        SETTINGS | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ"}}},
        "quant_algo is 'W4A16_AWQ'",
    ),
    "scales of activations": (GOOD | {f"{MODULE}.pre_quant_scale": scales(16)}, SETTINGS, "pre_quant_scale .* scales"),
    "no scale": ({WEIGHT: GOOD[WEIGHT]}, SETTINGS, f"has no {SCALE} beside it"),
    "a scale of another shape": (GOOD | {SCALE: scales(3)}, SETTINGS, "has no form of a scale"),
    "a scale of another dtype": (GOOD | {SCALE: scales().double()}, SETTINGS, "is F64, which no scale is"),
    "no codes": ({WEIGHT: torch.ones(8, 16), SCALE: scales()}, SETTINGS, "is the scale of a weight that is not there"),
    "nothing": ({"x": torch.ones(2)}, SETTINGS, "says that weights are quantized, and none is"),
    "an excluded weight": (GOOD, SETTINGS | {"ignore": ["model.layers.0*"]}, "but the config excludes it"),
    "no scale of the scales": ({WEIGHT: nvfp4()[WEIGHT], SCALE: nvfp4()[SCALE]}, SETTINGS, f"has no {SCALE}_2"),
    "groups of another size": (nvfp4(), SETTINGS | {"group_size": 32}, r"must be F8_E4M3 \[4, 4\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    tensors, settings, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        values(checkpoint(tmp_path, tensors, settings), WEIGHT)
