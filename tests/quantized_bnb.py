"""Small bases in bitsandbytes' 4 and 8 bits, as the real library makes them, with what it dequantizes them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from quantized_bases import linears, plain_model, write
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def quantized4(name: str, value: torch.Tensor, storage: str = "uint8", **options: Any) -> tuple[Tensors, torch.Tensor]:
    """A weight as `Linear4bit` saves it, and dequantized."""
    dtype = getattr(torch, storage)
    codes, state = bnb.quantize_4bit(value, quant_storage=dtype, **options)
    packed = {f"{name}.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    return {name: codes, **packed}, dequantized4(codes, state, value.shape)


def dequantized4(codes: torch.Tensor, state: Any, shape: torch.Size) -> torch.Tensor:
    """By the library, as one long row: on AVX-512 it takes wrong scales if blocks do not divide rows."""
    state.shape = torch.Size((1, shape.numel()))
    return bnb.dequantize_4bit(codes, state).reshape(shape)


def quantized8(name: str, value: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A weight as `Linear8bitLt` saves it, and dequantized."""
    codes, scales, _ = bnb.int8_vectorwise_quant(value.half())
    module = name.removesuffix(".weight")
    form = torch.tensor(0, dtype=torch.uint8)
    found = {name: codes, f"{module}.SCB": scales, f"{module}.weight_format": form}
    return found, bnb.int8_vectorwise_dequant(codes, scales).to(value.dtype)


def settings4(kind: str, nested: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }


SETTINGS8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


def bnb_folder(work: Path, kind: str, dtype: str = "bfloat16", **options: Any) -> tuple[Path, Path]:
    """(quantized, dequantized by bitsandbytes) folders; `kind` is nf4, fp4 or int8."""
    base = plain_model(work / "plain", dtype)
    tensors = load_file(base / "model.safetensors")
    quantized, truth = dict(tensors), dict(tensors)
    for name in linears(tensors):
        if kind == "int8":
            parts, truth[name] = quantized8(name, tensors[name])
        else:
            parts, truth[name] = quantized4(name, tensors[name], quant_type=kind, **options)
        quantized |= parts
    settings = SETTINGS8 if kind == "int8" else settings4(kind, options.get("compress_statistics", False))
    folder = write(work / "quantized", base, quantized, settings)
    plain = write(work / "dequantized", base, truth, {})
    (plain / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder, plain
