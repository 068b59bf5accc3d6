"""VeRA: W'[o, j] = W[o, j] + sum over k of b[o] B[o, k] d[k] A[k, j].

In float32 a term is two scaled factors and their product, so the bound is (r + 4) u |b||B||d||A| with u = 2^-24.
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
    rows = {role: arrays[role][start:stop] for role in ("b", "B")}
    return {**rows, "d": arrays["d"][:], "A": arrays["A"][:]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    count, width = weight.shape
    core = np.einsum("o,ok,k->ok", part["b"][:count], part["B"][:count], part["d"])
    bases = part["A"][:, :width]
    np.einsum("ok,kj->oj", core, bases, out=exact, optimize=True)
    exact += weight
    size: Array = np.einsum("ok,kj->oj", np.abs(core), np.abs(bases), optimize=True)
    size *= (len(bases) + 4) * 2.0**-24
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
