"""GraLoRA: with j = o div (out/N), p = o mod (out/N), n = i div (in/N), q = i mod (in/N) and t = r/N,

W'[o, i] = W[o, i] + s · (sum over k < t of B[j, n t + k, p] A[n, q, j t + k] + sum over k < h of G[o, k] F[k, i]).

float32's error is at most (t + h + 4) u s (|B||A| + |G||F|) with u = 2^-24.
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
    return tensors["B"].shape[2]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    """Blocks of rows, with A as (blocks, N, in/N, t), of which `A4` tells that it was cut so before."""
    up = arrays["B"]
    rows = up.shape[2]
    blocks = slice(start // rows, stop // rows)
    if "A4" in arrays:
        turned = arrays["A4"]
    else:
        whole = arrays["A"][:]
        count, wide, rank = whole.shape
        turned = whole.reshape(count, wide, count, rank // count).transpose(2, 0, 1, 3)
    found = {"A4": turned[blocks], "B": up[blocks]}
    return {**found, "F": arrays["F"][:], "G": arrays["G"][start:stop]} if "F" in arrays else found


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    down, up = part["A4"], part["B"]
    blocks, count, _, thin = down.shape
    up = up.reshape(blocks, count, thin, up.shape[2])

    def total(down: Array, up: Array, more: tuple[Array, Array] | None) -> Array:
        found: Array = np.einsum("jntp,jnqt->jpnq", up, down, optimize=True).reshape(weight.shape)
        return found if more is None else found + more[0] @ more[1]

    more = (part["G"], part["F"]) if "F" in part else None
    scale = numbers["scale"]
    np.add(weight, scale * total(down, up, more), out=exact)
    sizes = None if more is None else (np.abs(more[0]), np.abs(more[1]))
    terms = thin + (len(part["F"]) if more is not None else 0) + 4
    bound = total(np.abs(down), np.abs(up), sizes)
    bound *= terms * 2.0**-24 * abs(scale)
    return bound


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
