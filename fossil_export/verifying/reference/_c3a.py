"""C3A: W'[o, j] = W[o, j] + w[o div b, j div b, (j - o) mod b] / in. One division in float32: u |w| / in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return tensors["w"].shape[2]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    size = arrays["w"].shape[2]
    return {"w": arrays["w"][start // size : stop // size]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    kernel = part["w"]
    size = kernel.shape[2]
    row, column = np.arange(weight.shape[0])[:, None], np.arange(weight.shape[1])[None, :]
    change: Array = kernel[row // size, column // size, (column - row) % size] / weight.shape[1]
    np.add(weight, change, out=exact)
    return np.abs(change) * 2.0**-24


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
