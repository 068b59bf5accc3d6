"""LoHa: W'[o, j] = W[o, j] + s · (sum over k of A1[o, k] B1[k, j]) · (sum over k of A2[o, k] B2[k, j]).

With cores (r, r, *kernel), of the input i and the place k in the kernel that column j is, each of the two sums is one
over p and q of T[p, q, k] A[p, o] B[q, i]. The bounds of the sums are the standard ones, r u and 2 r u with u = 2^-24.
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
    rows = (slice(None), slice(start, stop)) if "T1" in arrays else slice(start, stop)
    return {role: array[rows] if role[0] == "A" else array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    first, first_size = _sums(part, "1", weight.shape)
    second, second_size = _sums(part, "2", weight.shape)
    np.multiply(first, second, out=exact)
    exact *= numbers["scale"]
    exact += weight
    terms = len(part["B1"]) * (4 if "T1" in part else 2) + 6
    size: Array = first_size * second_size
    size *= terms * 2.0**-24 * abs(numbers["scale"])
    return size


def _sums(part: Arrays, half: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """One of the two sums, and the sum of its terms' sizes."""
    import numpy as np

    tensors = [part[f"{role}{half}"] for role in "TAB" if f"{role}{half}" in part]
    terms = "pqxy,po,qi->oixy" if len(tensors) == 3 else "ok,kj->oj"
    made = [np.einsum(terms, *found, optimize=True) for found in (tensors, [np.abs(one) for one in tensors])]
    return made[0].reshape(shape), made[1].reshape(shape)


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
