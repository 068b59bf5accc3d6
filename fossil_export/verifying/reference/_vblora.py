"""VB-LoRA: W'[o, j] = W[o, j] + sum over k of B[o, k] A[k, j], with A[k, a L + q] = sum over v of p[k, a, v] V[v, q]
and B[b L + q, k] = sum over v of p'[b, k, v] V[v, q].

p is zero but for the k largest of a piece's logits, of which it is the softmax. Both factors are rounded to float32
once: (r + 4) u |B||A| with u = 2^-24.
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
    return tensors["V"].shape[1]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    length = arrays["V"].shape[1]
    rows = slice(start // length, stop // length)
    return {role: array[rows] if role[-1] == "B" else array[:] for role, array in arrays.items()}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    rank = int(numbers["r"])
    down = np.einsum("kav,vq->kaq", _shares(part, "A", numbers["most"]), part["V"], optimize=True).reshape(rank, -1)
    up = np.einsum("bkv,vq->bqk", _shares(part, "B", numbers["most"]), part["V"], optimize=True).reshape(-1, rank)
    np.matmul(up, down, out=exact)
    exact += weight
    size: Array = np.abs(up) @ np.abs(down)
    size *= (rank + 4) * 2.0**-24
    return size


def _shares(part: Arrays, role: str, most: int) -> Array:
    """p (…, n), dense."""
    import numpy as np

    if role in part:
        logits = part[role]
        least = np.sort(logits, axis=-1)[..., -most][..., None]
        found: Array = np.where(logits >= least, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
        found /= np.sum(found, axis=-1, keepdims=True)
        return found
    places, known = part[f"#{role}"].astype(np.int64), part[f"share {role}"]
    whole = np.concatenate([known, 1.0 - known.sum(axis=-1, keepdims=True)], axis=-1)
    found = np.zeros((*places.shape[:-1], len(part["V"])))
    np.put_along_axis(found, places, whole, axis=-1)
    return found


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
