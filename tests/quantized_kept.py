"""Small quantized bases of every format that is written again, each with an adapter, and what the format's own library
makes of a merged weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig
from quantized_bases import adapter_for, fp8_folder, linears, plain_model, write
from quantized_bnb import Tensors, bnb_folder, quantized4, quantized8
from quantized_int4 import awq, folder_of, gptq
from quantized_mxfp4 import gpt_oss, trained
from safetensors.torch import load_file, save_file
from test_quantized_mlx import folders as mlx_folders


@dataclass(frozen=True)
class Case:
    """`requantized` is, for a weight's name, its merged values in float32 and its tensors in the base, what the library
    stores of the values; None if none is here that does."""

    quantized: Path
    dequantized: Path
    adapter: Path
    requantized: Callable[[str, torch.Tensor, Tensors], Tensors] | None = None


def _case(folders: tuple[Path, Path], work: Path, requantized: Any = None) -> Case:
    return Case(*folders, adapter_for(folders[1], work / "adapter"), requantized)


def of_gptq(work: Path) -> Case:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
    found = folder_of(work, lambda shape, name: gptq(shape, act=True), said)
    return _case((found.quantized, found.dequantized), work)


def of_awq(work: Path) -> Case:
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    found = folder_of(work, lambda shape, name: awq(shape), said)
    return _case((found.quantized, found.dequantized), work)


def of_mxfp4(work: Path) -> Case:
    quantized, plain = gpt_oss(work)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_parameters=targets, target_modules=["q_proj"])
    return Case(quantized, plain, trained(plain, work / "adapter", config))


def of_mlx(work: Path) -> Case:
    return _case(mlx_folders(work, {"model.layers.0.mlp.down_proj": 8}), work)


def of_nf4(work: Path) -> Case:
    def again(name: str, value: torch.Tensor, stored: Tensors) -> Tensors:
        return quantized4(name, value, truth=False, quant_type="nf4")[0]

    return _case(bnb_folder(work, "nf4"), work, again)


def of_nested_nf4(work: Path) -> Case:
    return _case(bnb_folder(work, "nf4", compress_statistics=True), work)


def of_int8(work: Path) -> Case:
    return _case(bnb_folder(work, "int8"), work, lambda name, value, stored: quantized8(name, value)[0])


def of_fp8(work: Path) -> Case:
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(64, 64))
    owner = Fp8Quantize(SimpleNamespace(quantization_config=config))
    return _case(fp8_folder(work), work, lambda name, value, stored: owner._quantize_one(name, value))


def _settings(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _compressed(work: Path, form: str, library: Any, **weights: Any) -> Case:
    """Its own parameters are kept by packed ones, which were calibrated; others are made anew."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    base = plain_model(work / "plain")
    tensors = load_file(base / "model.safetensors")
    plain = dict(tensors)

    def stored(name: str, value: torch.Tensor, kept: Tensors | None = None) -> Tensors:
        module = name.removesuffix(".weight")
        groups = value.reshape(len(value), -1, weights.get("group_size") or value.shape[1])
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        if kept is not None and form == "pack-quantized":
            scale = kept[f"{module}.weight_scale"]
        found = library.compress({"weight": value, "weight_scale": scale.to(torch.bfloat16)}, scheme)
        return {f"{module}.{own}": part for own, part in found.items()}

    for name in linears(tensors):
        found = stored(name, tensors.pop(name))
        own = {one.rpartition(".")[2]: part for one, part in found.items()}
        plain[name] = library.decompress(own, scheme)["weight"].to(torch.bfloat16)
        tensors |= {one: part for one, part in found.items() if not one.endswith("g_idx")}
    folder = write(work / "quantized", base, tensors, _settings(form, weights))
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    return _case((folder, base), work, stored)


def of_packed(work: Path) -> Case:
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    return _compressed(work, "pack-quantized", PackedQuantizationCompressor, **said)


def of_channels(work: Path) -> Case:
    said = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return _compressed(work, "int-quantized", BaseCompressor.get_value_from_registry("int-quantized"), **said)


CASES = {
    "gptq": of_gptq,
    "awq": of_awq,
    "mxfp4": of_mxfp4,
    "mlx": of_mlx,
    "nf4": of_nf4,
    "nested nf4": of_nested_nf4,
    "int8": of_int8,
    "fp8": of_fp8,
    "packed": of_packed,
    "channels": of_channels,
}
