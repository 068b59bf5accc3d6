"""BOFT: W' = diag(s) W (M_N … M_1)ᵀ, M_i = P_i diag(R_1, R_2, …) P_iᵀ, written as whole matrices (in, in).

R = (I - S)(I + S)⁻¹ with S = (X - Xᵀ) / 2. P_i deals each run of 2ⁱ⁺¹ pieces, of half a block each: the
even pieces before the odd ones. The bound is the standard one for N products of b terms and the scale.
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
    return {"X": arrays["X"][:], "s": arrays["s"][start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    stored = part["X"]
    factors, _, size, _ = stored.shape
    exact[:] = weight
    bound: Array = np.abs(weight)
    for number in range(factors):
        places = _places(weight.shape[1], size, number) if factors > 1 else np.arange(weight.shape[1])
        skew = (stored[number] - stored[number].swapaxes(1, 2)) / 2
        turns = (np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew)
        # P diag(R) Pᵀ: row and column k of it are row and column places[k] of diag(R).
        columns = np.argsort(places)
        for values, factor in ((exact, turns), (bound, np.abs(turns))):
            cut = values[:, columns].reshape(len(weight), -1, size)
            values[:, columns] = np.einsum("obj,bij->obi", cut, factor, optimize=True).reshape(weight.shape)
    exact *= part["s"]
    bound *= np.abs(part["s"]) * ((size + 3) * factors + 2) * 2.0**-24
    return bound


def _places(inputs: int, size: int, number: int) -> Array:
    """The column of diag(R) that each column is."""
    import numpy as np

    pieces = np.arange(inputs).reshape(-1, 2 ** (number + 1), size // 2)  # runs, pieces of half a block
    return np.concatenate([pieces[:, 0::2], pieces[:, 1::2]], axis=1).reshape(-1)


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
