"""One quantized weight in a folder of its own: its rows as they are decoded, and what it is encoded to."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._input import InputFile, StoredArray
from fossil_export.checkpoints._opening import open_checkpoint

MODULE = "model.layers.0.mlp.up_proj"


def opened(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any] | None,
    module: str = MODULE,
    model_type: str = "llama",
) -> Checkpoint:
    """A checkpoint of that one weight, with something before and after it."""
    named = {f"{module}.{part}": value.contiguous() for part, value in tensors.items()}
    save_file({"a": torch.zeros(3)} | named | {"z": torch.zeros(5)}, folder / "model.safetensors")
    config = {"model_type": model_type} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def rows_of(base: Checkpoint, info: Any, start: int, stop: int) -> Any:
    """As the engine reads them: only what is sliced."""
    file = InputFile(info.path, base.files[0])
    shape = (stop - start, *info.shape[1:])
    offset = info.offset + start * (info.nbytes // info.shape[0])
    return StoredArray(file, offset, shape, numpy_dtype(info.dtype))


def rows(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    start: int,
    stop: int,
    module: str = MODULE,
) -> torch.Tensor:
    """Rows [start, stop) of the weight, decoded in two parts."""
    base = opened(folder, tensors, settings, module)
    found = CodedRows(base.tensors[f"{module}.weight"], partial(rows_of, base), start, stop)
    half = (stop - start) // 2
    return torch.cat([torch_of(found[:half]), torch_of(found[half:])])


def encoded(
    folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], matrix: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of other values, on the scales and zeros that are there."""
    base = opened(folder, tensors, settings, MODULE)
    coding: Any = base.tensors[f"{MODULE}.weight"].coding
    found = coding.encoder(partial(rows_of, base)).encode(matrix.numpy())
    return {name.removeprefix(f"{MODULE}."): torch_of(value) for name, value in found.items()}


def torch_of(array: Any) -> torch.Tensor:
    """As a tensor, whose bfloat16 NumPy does not have."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("i2")).view(torch.bfloat16)
    return torch.from_numpy(array)
