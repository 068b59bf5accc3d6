"""Uni-LoRA: W'[o, x] = W[o, x] + sum over k of θ[j[o, k]] q[o, k] θ[i[k, x]] p[k, x].

In float32 a term is two rounded factors and their product: (r + 4) u |B||A| with u = 2^-24.
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
    rows = {role: arrays[role][start:stop] for role in ("#B", "q")}
    return {**rows, **{role: arrays[role][:] for role in ("#A", "p", "t")}}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    first, second = (
        np.take(part["t"], part["#B"].astype(np.int64)) * part["q"],
        np.take(part["t"], part["#A"].astype(np.int64)) * part["p"],
    )
    np.matmul(first, second, out=exact)
    exact += weight
    size: Array = np.abs(first) @ np.abs(second)
    size *= (len(second) + 4) * 2.0**-24
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
