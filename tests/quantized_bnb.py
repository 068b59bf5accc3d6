"""Small bases in bitsandbytes' 4 and 8 bits, as the real library makes them, with what it dequantizes them to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import torch
from quantized_bases import linears, plain_model, write
from safetensors.torch import load_file

from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import CodedRows, read_rows
from fossil_export.checkpoints._dtypes import stored_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized import Stored
from fossil_export.checkpoints.quantized._bnb import BitsAndBytes

Tensors = dict[str, torch.Tensor]
NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


def quantized4(
    name: str, value: torch.Tensor, storage: str = "uint8", truth: bool = True, **options: Any
) -> tuple[Tensors, torch.Tensor]:
    """A weight as `Linear4bit` saves it, and (without `truth`: as it was) dequantized."""
    dtype = getattr(torch, storage)
    codes, state = bnb.quantize_4bit(value, quant_storage=dtype, **options)
    packed = {f"{name}.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    return {name: codes, **packed}, dequantized4(codes, state, value.shape) if truth else value


def dequantized4(codes: torch.Tensor, state: Any, shape: torch.Size) -> torch.Tensor:
    """By the library, as one long row: on AVX-512 it takes wrong scales if blocks do not divide rows."""
    state.shape = torch.Size((1, shape.numel()))
    with torch.compiler.set_stance("force_eager"):  # it compiles what it does in PyTorch
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


def _numpy(value: torch.Tensor) -> Any:
    """A tensor as NumPy's, with bfloat16 of ml_dtypes."""
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.contiguous().numpy()


def as_torch(value: Any) -> torch.Tensor:
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(value).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


class InMemory:
    """Tensors as a format is asked about them."""

    def __init__(self, tensors: Tensors, settings: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        self._raw = {name: np.frombuffer(_numpy(value).tobytes(), np.uint8) for name, value in tensors.items()}
        infos = {
            name: TensorInfo(name, NAMES[value.dtype], tuple(value.shape), Path("base.safetensors"), 0)
            for name, value in tensors.items()
        }
        self.stored = Stored("base", infos, config or {}, settings, self.rows_of)

    def rows_of(self, info: TensorInfo, start: int, stop: int) -> Any:
        first = info.offset or 0
        found = self._raw[info.name][first : first + info.nbytes].view(stored_dtype(info.dtype))
        return found.reshape(info.shape)[start:stop]

    def weight(self) -> TensorInfo:
        """The only one."""
        return next(BitsAndBytes().read(self.stored))


def decoded(
    tensors: Tensors,
    settings: dict[str, Any],
    start: int = 0,
    stop: int | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Rows [start, stop) of the one weight."""
    memory = InMemory(tensors, settings, config)
    info = memory.weight()
    return as_torch(CodedRows(info, memory.rows_of, start, info.shape[0] if stop is None else stop)[:])


def encoded(tensors: Tensors, settings: dict[str, Any], matrix: torch.Tensor) -> Tensors:
    """The stored tensors of the one weight, for other values."""
    coding: Any = InMemory(tensors, settings).weight().coding
    return {name: as_torch(value) for name, value in coding.encode(matrix.numpy()).items()}


def equal(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint in a folder."""
    info = checkpoint.tensors[name]
    return as_torch(np.array(read_rows(info, 0, info.shape[0], partial(view_rows, checkpoint.home))[:]))
