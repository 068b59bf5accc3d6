"""MLX's DoRA: W'[o, j] = m[o] V[o, j] / (sum over j of V[o, j]²)^½, where V is what MLX's LoRA would give.

The bound: with |V| off by at most e (LoRA's bound and the rounding of the sum), a row's length is off by at most ‖e‖,
so W' by m / ‖V‖ · (e + |V| ‖e‖ / ‖V‖), and four roundings more; u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference import _lora_mlx as lora_mlx
from fossil_export.verifying.reference._exact import Arrays, Exact

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class _Dora:
    def __init__(self, inner: Exact) -> None:
        self._inner = inner

    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return 1

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**self._inner.part(arrays, start, stop), "m": arrays["m"][start:stop]}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        import numpy as np

        unit = 2.0**-24
        off = self._inner.rebuild(weight, part, numbers, exact)
        assert off is not None
        off = off + np.abs(exact) * unit
        length = np.sqrt(np.sum(exact * exact, axis=1, keepdims=True))
        ratio = part["m"][:, None] / length
        off += np.abs(exact) * (np.sqrt(np.sum(off * off, axis=1, keepdims=True)) / length + 4 * unit)
        exact *= ratio
        off *= np.abs(ratio)
        return off

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> None:
        return None

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
        return None


LINEAR = _Dora(lora_mlx.LINEAR)
EMBEDDING = _Dora(lora_mlx.EMBEDDING)
