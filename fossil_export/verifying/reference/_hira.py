"""HiRA: W'[o, j] = W[o, j] (1 + sum over k of B[o, k] A[k, j]); of an embedding the sum of A[k, o] B[j, k].

float32's error is at most (r + 3) u |W||B||A| with u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference import _lora_embedding as lora_embedding
from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["Embedding", "down", "part", "rebuild", "unit", "up"]

part = lora.part


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    np.einsum("ok,kj,oj->oj", part["B"], part["A"], weight, out=exact, optimize=True)
    exact += weight
    size: Array = np.einsum("ok,kj->oj", np.abs(part["B"]), np.abs(part["A"]), optimize=True)
    size *= np.abs(weight)
    size *= (len(part["A"]) + 3) * 2.0**-24
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None


class Embedding:
    """The same of an embedding."""

    unit = staticmethod(unit)
    part = staticmethod(lora_embedding.part)
    up = staticmethod(up)
    down = staticmethod(down)

    @staticmethod
    def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        return rebuild(weight, {"B": part["A"].T, "A": part["B"].T}, numbers, exact)
