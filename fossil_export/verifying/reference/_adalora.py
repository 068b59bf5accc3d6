"""AdaLoRA: W'[o, j] = W[o, j] + s / (n + 1e-5) · sum over k of B[o, k] E[k] A[k, j].

LoRA's bound, with one more rounding of each product and two of each sum; n + 1e-5 is rounded to float32 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["down", "part", "rebuild", "unit", "up"]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"A": arrays["A"][:], "E": arrays["E"][:], "B": arrays["B"][start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    first, second, factor = part["B"] * part["E"].T, part["A"], numbers["scale"] / numbers["over"]
    np.matmul(first, second, out=exact)
    exact *= factor
    exact += weight
    size: Array = np.abs(first) @ np.abs(second)
    size *= (len(second) + 5) * 2.0**-24 * abs(factor)
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> Array:
    found: Array = part["B"] * (numbers["scale"] / numbers["over"])
    return found if found.shape[1] else _zeros(found.shape[0], 1)


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array:
    found: Array = arrays["A"] * arrays["E"]
    return found if len(found) else _zeros(1, inputs)


def _zeros(*shape: int) -> Array:
    import numpy as np

    return np.zeros(shape)
