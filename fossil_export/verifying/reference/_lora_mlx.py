"""MLX's LoRA, for a linear layer W'[o, j] = W[o, j] + s · sum over k of a[j, k] b[k, o], and for an embedding
W'[t, d] = W[t, d] + s · sum over k of a[t, k] b[k, d].

The bound for float32's sums of r products is the standard one, (r + 2) u s |a||b| with u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class _Mlx:
    """`of_tokens` for an embedding, whose rows are those of a."""

    def __init__(self, of_tokens: bool) -> None:
        self._indices = "tk,kd->td" if of_tokens else "jk,ko->oj"
        self._of_tokens = of_tokens

    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return 1

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        if self._of_tokens:
            return {"a": arrays["a"][start:stop], "b": arrays["b"][:]}
        return {"a": arrays["a"][:], "b": arrays["b"][:, start:stop]}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        import numpy as np

        first, second = part["a"], part["b"]
        np.einsum(self._indices, first, second, out=exact, optimize=True)
        exact *= numbers["scale"]
        exact += weight
        size: Array = np.einsum(self._indices, np.abs(first), np.abs(second), optimize=True)
        size *= (first.shape[1] + 2) * 2.0**-24 * abs(numbers["scale"])
        return size

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> Array | None:
        if self._of_tokens:
            return None
        found: Array = part["b"].T * numbers["scale"]
        return found

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array | None:
        if self._of_tokens:
            return None
        found: Array = arrays["a"][:].T
        return found


LINEAR = _Mlx(of_tokens=False)
EMBEDDING = _Mlx(of_tokens=True)
