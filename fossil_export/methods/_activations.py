"""Activation functions by the names of transformers' ACT2FN, on NumPy arrays and PyTorch tensors.

Those with parameters of their own or without a bounded slope are left out. Source: transformers/activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fossil_export.methods._arrays import is_torch

_ROOT = math.sqrt(2 / math.pi)


def _tanh(x: Any) -> Any:
    if is_torch(x):
        return x.tanh()
    import numpy as np

    return np.tanh(x)


def _sigmoid(x: Any) -> Any:
    return x.sigmoid() if is_torch(x) else 0.5 * (_tanh(0.5 * x) + 1)


def _erf(x: Any) -> Any:
    if is_torch(x):
        return x.erf()
    import numpy as np

    return np.vectorize(math.erf, otypes=[x.dtype])(x)


def _clip(x: Any, low: float | None, high: float | None = None) -> Any:
    return x.clip(low, high)


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1 + _erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + _tanh(_ROOT * (x + 0.044715 * x * x * x)))


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "relu": lambda x: _clip(x, 0),
    "relu6": lambda x: _clip(x, 0, 6),
    "leaky_relu": lambda x: _clip(x, 0) + _clip(x, None, 0) * 0.01,
    "linear": lambda x: x,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "swish": _silu,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
}
