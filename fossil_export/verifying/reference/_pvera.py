"""PVeRA: VeRA's sum over the first r of 2r rows, W'[o, j] = W[o, j] + sum over k < r of b[o] B[o, k] d[k] A[k, j]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference import _vera as vera
from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["down", "part", "rebuild", "unit", "up"]

part, up, down = vera.part, vera.up, vera.down


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    half = part["B"].shape[1]
    means = {"A": part["A"][:half], "d": part["d"][:half]}
    return vera.rebuild(weight, {**part, **means}, numbers, exact)
