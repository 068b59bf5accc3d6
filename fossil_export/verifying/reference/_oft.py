"""OFT: W'[o, g b + i] = sum over j of R_g[i, j] W[o, g b + j]; of an embedding R_g[j, i].

R is (I - Q)(I + Q)⁻¹, or I + 2Q + … + 2Qⁿ⁻² + Qⁿ⁻¹ with n terms; Q[i, j] = -Q[j, i] is stored row by row for i < j. The
bound of float32's sums of b products is the standard one, with R rounded once: (b + 3) u |W| |R|, u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class _Oft:
    def __init__(self, terms: str) -> None:
        self._terms = terms

    def unit(self, tensors: Mapping[str, Any]) -> int:
        return unit(tensors)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"Q": arrays["Q"][:]}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        import numpy as np

        stored = part["Q"]
        size = next(b for b in range(2, 2 + 2 * stored.shape[1]) if b * (b - 1) == 2 * stored.shape[1])
        blocks = _turns(_skews(stored, size, numbers["eps"]), numbers["terms"])
        blocks = np.broadcast_to(blocks, (weight.shape[1] // size, size, size))
        cut = weight.reshape(len(weight), -1, size)
        exact[:] = np.einsum(self._terms, blocks, cut, optimize=True).reshape(weight.shape)
        bound: Array = np.einsum(self._terms, np.abs(blocks), np.abs(cut), optimize=True).reshape(weight.shape)
        bound *= (size + 3) * 2.0**-24
        return bound

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> None:
        return None

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
        return None


def _skews(stored: Array, size: int, eps: float | None) -> Array:
    """Q of each block (count, b, b), no longer than eps / √count."""
    import numpy as np

    count, at = len(stored), 0
    found = np.zeros((count, size, size))
    for i in range(size - 1):
        found[:, i, i + 1 :] = stored[:, at : at + size - 1 - i]
        at += size - 1 - i
    found -= found.transpose(0, 2, 1)
    if eps is not None:
        longest = np.float64(np.float32(eps) * (np.float32(1) / np.sqrt(np.float32(count))))
        for block in found:
            length = np.sqrt(np.square(block).sum())
            if length > longest:
                block *= longest / length
    return found


def _turns(skews: Array, terms: int | None) -> Array:
    import numpy as np

    one: Array = np.broadcast_to(np.eye(skews.shape[1]), skews.shape)
    if terms is None:
        turned: Array = (one - skews) @ np.linalg.inv(one + skews)
        return turned
    if terms < 3:
        return one + 2 * skews if terms == 2 else one
    last = max(terms - 1, 3)  # PEFT ends three terms as it does four
    powers = [np.linalg.matrix_power(skews, power) for power in range(1, last + 1)]
    found: Array = one + 2 * np.sum(powers[:-1], axis=0) + powers[-1]
    return found


oft = _Oft("gij,ogj->ogi")
oft_embedding = _Oft("gji,ogj->ogi")
