"""LoKr: W'[i b + p, j d + q] = W[…] + s · W1[i, j] · W2[p, q], W1 = A1 B1 and W2 = A2 B2 (with T2: sum of T A B) if
they are not stored whole. A whole W2 (b, d, k) of three dimensions: numpy.kron of the two, its values in their order.
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
    first = (tensors["W1"] if "W1" in tensors else tensors["A1"]).shape[0]
    if "W2" in tensors:
        shape = tensors["W2"].shape
        return shape[0] * (first if len(shape) == 3 else 1)
    return tensors["A2"].shape[1] if "T2" in tensors else tensors["A2"].shape[0]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    """`start` and `stop` are multiples of `unit`."""
    if "W2" in arrays:
        rows = arrays["W2"].shape[0]
        whole = len(arrays["W2"].shape) == 3
    else:
        rows, whole = arrays["A2"].shape[1 if "T2" in arrays else 0], False
    mine = slice(None) if whole else slice(start // rows, stop // rows)
    return {role: array[mine] if role in ("W1", "A1") else array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    exact[:] = _kron(part, weight.shape)
    exact *= numbers["scale"]
    exact += weight
    terms = 5 + sum(len(part[role]) * factor for role, factor in (("B1", 1), ("B2", 2)) if role in part)
    size = _kron({role: np.abs(array) for role, array in part.items()}, weight.shape)
    size *= terms * 2.0**-24 * abs(numbers["scale"])
    return size


def _kron(part: Arrays, shape: tuple[int, ...]) -> Array:
    import numpy as np

    first = part["W1"] if "W1" in part else np.einsum("ir,rj->ij", part["A1"], part["B1"])
    if "W2" in part:
        second = part["W2"]
    elif "T2" in part:
        second = np.einsum("ijxy,ip,jq->pqxy", part["T2"], part["A2"], part["B2"], optimize=True)
    else:
        second = np.einsum("pr,rq->pq", part["A2"], part["B2"])
    if second.ndim == 4:
        first = first[:, :, None, None]
    found: Array = np.kron(first, second).reshape(shape)
    return found


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
