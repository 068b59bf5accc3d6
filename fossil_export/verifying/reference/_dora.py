"""DoRA: W'[o, j] = m[o] / |V[o]| · V[o, j], V[o, j] = W[o, j] + s · sum over k of B[o, k] A[k, j]; of an embedding,
V[t, d] has the length of its column d.

float32's error, with u = 2^-24: that of V is lora's, e, and one rounding; that moves its length by at most |e| + u |V|,
and length, quotient and product are rounded once each. (The squares are added up in float64.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference import _lora_embedding as lora_embedding
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Dora:
    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return 1

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        lengths = arrays["m"]
        own = lengths[start:stop] if len(lengths.shape) == 1 else lengths[:, start:stop]
        return {**lora.part(arrays, start, stop), "m": own}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        bound = lora.rebuild(weight, part, numbers, exact)
        return lengthened(exact, bound, part["m"].reshape(-1, 1), 1)

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> None:
        return None

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
        return None


class DoraEmbedding(Dora):
    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return tensors["A"].shape[1]

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**lora_embedding.part(arrays, start, stop), "m": arrays["m"][:]}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        bound = lora_embedding.rebuild(weight, part, numbers, exact)
        return lengthened(exact, bound, part["m"].reshape(1, -1), 0)


def lengthened(exact: Array, bound: Array, wanted: Array, axis: int) -> Array:
    """Give the rows (axis 1) or columns (axis 0) of V, in `exact`, their lengths; returns the bound that follows."""
    import numpy as np

    found = np.sqrt(np.square(exact).sum(axis=axis, keepdims=True))
    moved = np.sqrt(np.square(bound).sum(axis=axis, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        exact *= wanted / found
        bound *= np.abs(wanted) / found
        bound += np.abs(exact) * (moved / found + 6 * 2.0**-24)
    bound *= 1 + 2.0**-10
    return bound
