"""Adapters saved as PyTorch pickles, loaded without running any code that may be in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, INTEGERS, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np

_SAFE = (2, 6)
"""The first PyTorch whose restricted unpickler cannot be got round."""

_NAMES = BY_TORCH_NAME | INTEGERS


def read_pickled(path: Path) -> tuple[tuple[TensorInfo, ...], dict[str, np.ndarray[Any, Any]]]:
    """The tensors of a `.bin`, `.pt` or `.pth` state dict, and their arrays.

    PyTorch's restricted unpickler (`weights_only=True`) refuses everything but tensors and plain
    containers. Raises AdapterError for anything else.
    """
    try:
        import torch
    except ImportError as problem:
        raise MissingExtraError("torch", "torch", f"{path}: reading a pickled adapter") from problem
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE:
        raise AdapterError(
            f"{path}: PyTorch {torch.__version__} can be made to run code by a pickle (CVE-2025-32434); install "
            "torch>=2.6, or ask for the adapter as safetensors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise AdapterError(
            f"{path}: is not a pickle of plain tensors, it may hold code and was not run; "
            "ask for the adapter as safetensors, or load it yourself where that is safe and save it again"
        ) from problem
    except (OSError, RuntimeError, EOFError, ValueError) as problem:
        raise AdapterError(
            f"{path}: cannot be read ({str(problem).splitlines()[0]}); fetch or save it again"
        ) from problem
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise AdapterError(f"{path}: is not a state dict (a map of names to tensors); save the adapter with PEFT")
    infos, arrays = [], {}
    for name, tensor in state.items():
        torch_name = str(tensor.dtype).removeprefix("torch.")
        dtype = _NAMES.get(torch_name, torch_name)
        infos.append(TensorInfo(str(name), dtype, tuple(tensor.shape), path, None))
        if torch_name in _NAMES:
            flat = tensor.detach().contiguous()
            if dtype == "BF16":  # NumPy has no bfloat16 of its own to hand over
                arrays[str(name)] = flat.view(torch.int16).numpy().view(numpy_dtype(dtype))
            else:
                arrays[str(name)] = flat.numpy()
    return tuple(infos), arrays
