"""LoRA: W'[o, j] = W[o, j] + s · sum over k of B[o, k] A[k, j].

The bound for float32's sums of r products is the standard one, (r + 2) u s |B||A| with u = 2^-24.
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
    return 1


COMPILED = "product"


def across(tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    shape = tensors["A"].shape
    return (1, shape[0]) if len(shape) == 2 else None


def columns(arrays: Arrays, first: int, last: int) -> Arrays:
    return {"A": arrays["A"][:, first:last], "B": arrays["B"]}


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"A": arrays["A"][:], "B": arrays["B"][start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    rank = part["A"].shape[0]
    first, second = part["B"].reshape(-1, rank), part["A"].reshape(rank, -1)
    np.matmul(first, second, out=exact)
    exact *= numbers["scale"]
    exact += weight
    size: Array = np.abs(first) @ np.abs(second)
    size *= (rank + 2) * 2.0**-24 * abs(numbers["scale"])
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> Array | None:
    found: Array = part["B"] * numbers["scale"]
    return found if found.ndim == 2 else None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array | None:
    found: Array = arrays["A"]
    return found if len(found.shape) == 2 else None
