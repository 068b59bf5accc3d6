"""Tile: W'[o, j] = W[o, j] + D[j mod r, o]; as LoRA, A[k, j] = 1 where j mod r == k and B = Dᵀ."""

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


COMPILED = "tiled"


def across(tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    return tensors["D"].shape[0], 0


def columns(arrays: Arrays, first: int, last: int) -> Arrays:
    return arrays


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"D": arrays["D"][:, start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> None:
    import numpy as np

    shard = part["D"]
    np.take(shard.T, np.arange(weight.shape[1]) % len(shard), axis=1, out=exact, mode="clip")
    exact += weight


def up(part: Arrays, numbers: Mapping[str, Any]) -> Array:
    found: Array = part["D"].T
    return found


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array:
    import numpy as np

    rank = int(numbers["r"])
    found: Array = (np.arange(rank)[:, None] == np.arange(inputs) % rank).astype(np.float64)
    return found
