"""HRA: W' = W H_1 … H_r, H_k = I - 2 u_k u_kᵀ / |u_k|²; with apply_GS of the u made orthogonal one after another.

float32 is used for the last product alone, W - C Uᵀ with C = W U T; its r terms are bounded by (r + 3) u |C| |U| with
u = 2^-24. C[o, k] is what the k-th mirror takes from row o.
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
    return {"u": arrays["u"][:]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    exact[:] = weight
    bound = np.zeros_like(weight)
    before: list[Array] = []
    for mirror in part["u"].T:
        unit = mirror / np.linalg.norm(mirror)
        if numbers["orthogonal"]:
            for other in before:
                unit = unit - np.dot(other, unit) * other
            unit /= np.linalg.norm(unit)
            before.append(unit)
        taken = 2 * (exact @ unit)
        exact -= np.outer(taken, unit)
        bound += np.outer(np.abs(taken), np.abs(unit))
    bound *= (part["u"].shape[1] + 3) * 2.0**-24
    return bound


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
