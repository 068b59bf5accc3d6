"""DEFT: W'[o, j] = W[o, j] + sum over k of Q[o, k] (s R[k, j] - sum over i of P[i, k] W[i, j]).

Merge and check both have it in float64: for "relu" the bound is the one of their products. The Q of a QR decomposition
is only as sure as the matrix is well conditioned, so there the bound grows with its condition number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return tensors["P"].shape[0]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {role: array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    left = part["P"]
    right, doubt = np.where(left > 0, left, 0.0), 1.0
    if numbers["way"] == "qr":
        doubt = float(np.linalg.cond(left))
        left = right = _householder(left)
    injected = numbers["inject"] * part["R"] if "R" in part else np.zeros((left.shape[1], weight.shape[1]))
    removed = np.einsum("ik,ij->kj", right, weight, optimize=True)
    np.einsum("ok,kj->oj", left, injected - removed, out=exact, optimize=True)
    exact += weight
    size = np.abs(injected) + np.abs(right).T @ np.abs(weight)
    bound: Array = np.abs(left) @ size
    bound *= (len(left) + left.shape[1] + 8) * 2.0**-52 * doubt
    return bound


def _householder(matrix: Array) -> Array:
    """Q of matrix = Q R, by reflections, with the signs that LAPACK gives it."""
    import numpy as np

    rows, columns = matrix.shape
    rest = matrix.copy()
    found = np.eye(rows, columns)
    vectors = []
    for place in range(min(rows, columns)):
        vector = rest[place:, place].copy()
        tail = np.linalg.norm(vector[1:])
        if tail:
            vector[0] += np.copysign(np.linalg.norm(vector), vector[0])
            vector /= np.linalg.norm(vector)
            rest[place:] -= 2 * np.outer(vector, vector @ rest[place:])
        else:
            vector[:] = 0
        vectors.append(vector)
    for place, vector in reversed(list(enumerate(vectors))):
        found[place:] -= 2 * np.outer(vector, vector @ found[place:])
    return found


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
