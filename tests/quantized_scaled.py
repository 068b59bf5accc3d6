"""One-weight checkpoints of codes and scales, and how fossil-export and the formats' own libraries read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._opening import open_checkpoint

MODULE = "model.layers.0.mlp.up_proj"


def checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: Any, dtype: str | None = "bfloat16", **config: Any
) -> Checkpoint:
    """A folder of these tensors and a config with these quantization settings (None: without any), opened."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config |= {"model_type": "llama"} | ({"dtype": dtype} if dtype else {})
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def values(opened: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows of a weight, as fossil-export reads them."""
    info = opened.tensors[name]
    found = read_rows(info, start, info.shape[0] if stop is None else stop, partial(view_rows, opened.home))[:]
    if found.dtype.name == "bfloat16":
        return torch.from_numpy(found.view("i2").copy()).view(torch.bfloat16)
    return torch.from_numpy(found.copy())


def same(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """The same dtype, shape and bits."""
    bits = {2: torch.int16, 4: torch.int32}[truth.element_size()]
    return found.dtype == truth.dtype and torch.equal(found.contiguous().view(bits), truth.contiguous().view(bits))


def fp8_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Every finite code, in some order: subnormal ones, zeros of both signs and the largest."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
    return torch.where(found.float().isfinite(), found.float(), 1.0).to(dtype)


def scales(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Positive scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(3).sub(6).exp2().to(dtype)


def encoded(opened: Checkpoint, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight of these values."""
    coding: Any = opened.tensors[name].coding
    found = coding.encode(matrix.reshape(-1, coding.width).numpy())
    assert {one.name: one.shape for one in coding.stored} == {key: value.shape for key, value in found.items()}
    types = {one.name: one.dtype for one in coding.stored}
    kinds = {
        **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
        **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8},
    }
    return {
        key: torch.from_numpy(value.reshape(-1).view("u1").copy()).view(kinds[types[key]]).reshape(value.shape)
        for key, value in found.items()
    }
