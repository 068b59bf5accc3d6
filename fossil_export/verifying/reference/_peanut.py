"""PEANuT: W'[o, j] = W[o, j] + s · sum over k of B[o, k] h[k, j], h being what the network makes of A W, column by
column of W.

Merge and check both have it in float64, so beside each value goes a bound on the error of both, with u = 2^-52. A
product of matrices with n terms adds (n + 2) u |M||x| to |M| times the error of x. A function of slope L at most
multiplies the error by L, and is itself within 16 u (|x| + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_U = 2.0**-52
_SLOPE = 1.13
"""The steepest of the functions, gelu, is not steeper."""


def _logistic(x: Array) -> Array:
    import numpy as np

    grown = np.exp(-np.abs(x))
    found: Array = np.where(x < 0, grown, 1.0) / (1.0 + grown)
    return found


def _normal(x: Array) -> Array:
    """x times the share of a normal distribution below it, exactly or with a tanh."""
    import numpy as np

    below = [0.5 * math.erfc(-value / math.sqrt(2)) for value in x.ravel().tolist()]
    found: Array = x * np.array(below).reshape(x.shape)
    return found


def _near_normal(x: Array) -> Array:
    import numpy as np

    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * np.power(x, 3))
    return x * _logistic(2 * inner)  # (1 + tanh z) / 2 is the logistic function of 2 z


def _function(name: str) -> Callable[[Array], Array]:
    import numpy as np

    if name in ("gelu", "gelu_python"):
        return _normal
    if name.startswith("gelu_"):
        return _near_normal
    table: dict[str, Callable[[Array], Array]] = {
        "relu": lambda x: np.where(x > 0, x, 0.0),
        "relu6": lambda x: np.minimum(np.where(x > 0, x, 0.0), 6.0),
        "leaky_relu": lambda x: np.where(x > 0, x, x / 100),
        "linear": lambda x: x,
        "tanh": np.tanh,
        "sigmoid": _logistic,
        "silu": lambda x: x * _logistic(x),
        "swish": lambda x: x * _logistic(x),
        "quick_gelu": lambda x: x * _logistic(1.702 * x),
    }
    return table[name]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return tensors["B"].shape[0]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {role: array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    name, count = numbers["act_fn"], int(numbers["depth"])
    function = _function(name)
    plain = name in ("relu", "relu6", "linear")

    def times(matrix: Array, value: Array, error: Array) -> tuple[Array, Array]:
        size = np.abs(matrix)
        return matrix @ value, size @ (error + (matrix.shape[1] + 2) * _U * np.abs(value))

    def bent(matrix: Array, value: Array, error: Array) -> tuple[Array, Array]:
        value, error = times(matrix, value, error)
        if plain:
            return function(value), error
        return function(value), _SLOPE * error + 16 * _U * (np.abs(value) + (name == "sigmoid"))

    value, error = bent(part["A"], weight, np.zeros_like(weight))
    path = []
    for place in range(count):
        path.append((value, error))
        value, error = bent(part[f"E{place}"], value, error)
    for place in range(count):
        before, before_error = path.pop()
        value, error = bent(part[f"D{place}"], value, error)
        value, error = value + before, error + before_error
        error += _U * np.abs(value)
    change, error = times(part["B"], value, error)
    change *= numbers["scale"]
    np.add(weight, change, out=exact)
    bound: Array = 1.01 * (abs(numbers["scale"]) * error + _U * np.abs(change))  # 1.01 for what is of second order
    return bound


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
