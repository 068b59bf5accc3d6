"""DeLoRA: W'[o, j] = W[o, j] + λ / r · w[j] · sum over k of B[o, k] A[k, j] / (|A[k, :]| |B[:, k]|).

What follows B is rounded to float32 once, so the bound is (r + 3) u |B||…| with u = 2^-24.
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
    return tensors["B"].shape[0]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {role: array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    rank = len(part["A"])
    rows = np.maximum(np.linalg.norm(part["A"], axis=1), 0.0001)
    columns = np.maximum(np.linalg.norm(part["B"], axis=0), 0.0001)
    unit_columns = part["B"] / columns
    unit_rows = part["A"] / rows[:, None] * part["w"]
    factor = float(part["l"][0]) / rank
    np.matmul(unit_columns, unit_rows, out=exact)
    exact *= factor
    exact += weight
    size: Array = np.abs(unit_columns) @ np.abs(unit_rows)
    size *= (rank + 3) * 2.0**-24 * abs(factor)
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
