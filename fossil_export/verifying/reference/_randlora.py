"""RandLoRA: with X[i, b r + k] = B[i, b, k] and Y[k n + b, j] = λ[k, b] γ[b, j] A[k, 0, j],

W'[o, i] = W[o, i] + s · sum over c of X[o, c] Y[c, i]; X and Y with o and i exchanged if out < in.

float32's error is at most (n r + 5) u s |X||Y| with u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return 1 << 40  # all rows, however many


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {role: array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    outputs, inputs = weight.shape
    turned = outputs < inputs
    rank, count = part["l"].shape
    place = np.arange(rank * count)
    left = part["B"][: max(outputs, inputs), place // rank, place % rank]
    small = part["A"][place // count, 0, : min(outputs, inputs)]
    right = part["l"][place // count, place % count][:, None] * small * part["g"][place % count]
    if turned:
        left, right = right.T, left.T
    np.matmul(left, right, out=exact)
    exact *= numbers["scale"]
    exact += weight
    size: Array = np.abs(left) @ np.abs(right)
    size *= (len(place) + 5) * 2.0**-24 * abs(numbers["scale"])
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
