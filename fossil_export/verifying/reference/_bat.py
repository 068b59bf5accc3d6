"""Bat: W'[b, a] = W[b, a] + W[b, a] B[b] + B[b] in blocks (r, r).

The bound for float32's products of r terms each is the standard one, (r + 2) u (|W| + |W||B| + |B|) with u = 2^-24.
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
    return tensors["B"].shape[1]


COMPILED = "blocks"


def across(tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    return tensors["B"].shape[1], 0


def columns(arrays: Arrays, first: int, last: int) -> Arrays:
    return arrays


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    blocks = arrays["B"]
    rank = blocks.shape[1]
    return {"B": blocks[start // rank : stop // rank]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    blocks = part["B"]
    count, width = weight.shape
    rank = blocks.shape[1]
    size = np.empty_like(weight)
    for block in range(count // rank):
        rows = slice(block * rank, (block + 1) * rank)
        mixing = blocks[block]
        for column in range(0, width, rank):
            at = weight[rows, column : column + rank]
            exact[rows, column : column + rank] = at + at @ mixing + mixing
            size[rows, column : column + rank] = np.abs(at) + np.abs(at) @ np.abs(mixing) + np.abs(mixing)
    size *= (rank + 2) * 2.0**-24
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
