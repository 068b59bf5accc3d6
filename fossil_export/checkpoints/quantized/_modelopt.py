"""fp8 and NVFP4 of NVIDIA's ModelOpt, told by config.json or by hf_quant_config.json beside it.

    W[o, j] = code[o, j] · scale                                     fp8, by weight, row, or block of 128 × 128
    W[o, j] = code[o, j] · (scale[o, j // 16] · scale_2)             NVFP4, two codes in a byte, the low half first

in float32, rounded once to the model's dtype: `X.weight`, `X.weight_scale` and `X.weight_scale_2`. Source:
`NVFP4QTensor.dequantize` and `FP8QTensor.dequantize` in modelopt/torch/quantization/qtensor (the scales stay float32
here, as in every runtime), and modelopt/torch/export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import translate
from typing import Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype
from fossil_export.checkpoints.quantized._scaled import Scaled

METHOD = "modelopt"
ALGORITHMS = {
    *("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"),
    "MIXED_PRECISION",
}
"""What is read of `quant_algo`; others have more than codes and scales (AWQ, SmoothQuant), or whole numbers."""
BLOCK = (128, 128)
PASSED = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
MORE = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


class ModelOpt(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        return (stored.method or "").startswith(METHOD)

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        settings = stored.settings or {}
        _check(stored, settings)
        dtype, excluded = float_dtype(stored.config), _excluded(stored)
        taken: set[str] = set()
        for name, codes in stored.tensors.items():
            if name.endswith(MORE):
                raise stored.error(codes, "scales what the model computes with, not just its weights; it is not read")
            if not name.endswith("weight") or codes.dtype not in ("F8_E4M3", "U8"):
                continue
            scales = stored.tensors.get(f"{name}_scale")
            if scales is None:
                raise stored.error(codes, f"has no {name}_scale beside it; fetch that file again")
            if excluded(name.rpartition(".")[0]):
                raise stored.error(codes, "is quantized, but the config excludes it; fetch both again")
            read = _fp8 if codes.dtype == "F8_E4M3" else _fp4
            coding = read(stored, codes, scales, settings, dtype)
            taken.update(one.name for one in coding.stored)
            yield coded(name, dtype, (*codes.shape[:-1], coding.width), coding)
        for name, info in stored.tensors.items():
            if name.endswith(("weight_scale", "weight_scale_2")) and name not in taken:
                raise stored.error(info, "is the scale of a weight that is not there as codes; fetch both again")
        if not taken:
            raise stored.error("quant_algo", "says that weights are quantized, and none is; take it out of the config")

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        return info.name.endswith(PASSED)


def _check(stored: Stored, settings: Mapping[str, Any]) -> None:
    """Only algorithms that are read."""
    layers = settings.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        raise stored.error("quantized_layers", f"is {layers!r}, not settings by module; mend the config")
    for algorithm in (settings.get("quant_algo"), *(one.get("quant_algo") for one in layers.values())):
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise stored.error("quant_algo", f"is {algorithm!r} ({METHOD}), which is not read")


def _excluded(stored: Stored) -> Callable[[str], bool]:
    names = stored.names("ignore") or stored.names("exclude_modules")
    if not names:
        return lambda module: False
    plain = {one for one in names if not set("*?[") & set(one)}
    pattern = re.compile("|".join(translate(one) for one in names if one not in plain) or r"(?!)")
    return lambda module: module in plain or pattern.match(module) is not None


def _fp8(stored: Stored, codes: TensorInfo, scales: TensorInfo, settings: Mapping[str, Any], dtype: str) -> Scaled:
    if len(codes.shape) < 2:
        raise stored.error(codes, "is no matrix, and only those are quantized; fetch it again")
    *lead, outputs, width = codes.shape
    if scales.dtype == "U8":
        if scales.shape != (*lead, outputs, width // 32) or width % 32:
            wanted = [*lead, outputs, width // 32]
            raise stored.error(scales, f"must be {wanted}, one power of two for each 32 weights; fetch it again")
        return Scaled(codes, scales, (1, 32), dtype, outputs, style="powers")
    if scales.dtype not in ("F32", "BF16", "F16"):
        raise stored.error(scales, f"is {scales.dtype}, which no scale is; fetch it again")
    squeezed = tuple(size for size in scales.shape if size != 1)
    grid = (-(-outputs // BLOCK[0]), -(-width // BLOCK[1]))
    if element_count(scales.shape) == 1:
        rows = max(1, element_count((*lead, outputs)))
        return Scaled(codes, scales, (rows, max(1, width)), dtype, rows)
    if lead and squeezed == tuple(lead):
        return Scaled(codes, scales, (outputs, width), dtype, outputs)
    if not lead and scales.shape in ((outputs,), (outputs, 1)):
        return Scaled(codes, scales, (1, width), dtype, outputs)
    if not lead and squeezed == tuple(size for size in grid if size != 1):
        return Scaled(codes, scales, BLOCK, dtype, outputs)
    raise stored.error(scales, f"has no form of a scale of {list(codes.shape)} that is known; fetch it again")


def _fp4(stored: Stored, codes: TensorInfo, scales: TensorInfo, settings: Mapping[str, Any], dtype: str) -> Scaled:
    if len(codes.shape) < 2:
        raise stored.error(codes, "is no matrix, and only those are quantized; fetch it again")
    overall = stored.tensors.get(f"{codes.name}_scale_2")
    if overall is None:
        raise stored.error(codes, f"has no {codes.name}_scale_2 beside it; fetch that file again")
    if overall.dtype != "F32" or element_count(overall.shape) != 1:
        raise stored.error(overall, f"is {overall.dtype}, and must be one float32; fetch it again")
    group = settings.get("group_size") or 16
    if type(group) is not int or group < 1:
        raise stored.error("group_size", f"is {group!r}, not a size; mend the config")
    *lead, outputs, half = codes.shape
    wanted = (*lead, outputs, 2 * half // group)
    if 2 * half % group or scales.shape != wanted or scales.dtype != "F8_E4M3":
        raise stored.error(scales, f"is {scales.dtype}, and must be F8_E4M3 {list(wanted)}; fetch it again")
    return Scaled(codes, scales, (1, group), dtype, outputs, packed=True, overall=overall)
