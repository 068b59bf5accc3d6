"""SHiRA: W'[i[0, k], i[1, k]] = W[i[0, k], i[1, k]] + v[k] for each k, a single sum unless a place is there twice."""

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

    rows, columns = part["#i"].astype(np.int64)
    return sparse(weight, rows, columns, part["v"], exact)


def sparse(weight: Array, rows: Array, columns: Array, values: Array, exact: Array) -> Array:
    import numpy as np

    exact[:] = weight
    counts, size = np.zeros(weight.shape), np.zeros(weight.shape)
    np.add.at(exact, (rows, columns), values)
    np.add.at(counts, (rows, columns), 1)
    np.add.at(size, (rows, columns), np.abs(values))
    return size * np.maximum(counts - 1, 0) * 2.0**-24


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
