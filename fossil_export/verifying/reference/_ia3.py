"""(IA)³: W'[o, j] = W[o, j] · l[o], or W[o, j] · l[j] of a feed-forward module; b'[o] = b[o] · l[o]. One rounding."""

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
    """Factors of outputs as a column, of inputs as a row."""
    factors = arrays["l"][:]
    if factors.shape == (1, 1) or (factors.ndim == 2 and factors.shape[0] == 1):
        return {"l": factors}
    return {"l": factors.reshape(-1, 1)[start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> None:
    exact[:] = weight * part["l"]


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
