"""DoRA as MLX trains it: LoRA, whose sum with the weight gets a trained length for each row.

    linear layer    V = W + s · (a b)ᵀ        W' = m ∘ V / ‖V‖        ‖V‖, m (out), row by row
    embedding       V = W + s · a b           the same, for each token

Source: `DoRALinear.__call__` and `DoRAEmbedding.__call__` in mlx_lm/tuner/dora.py (arXiv 2402.09353, equation 5). The
lengths of the rows are summed in float64, all else is float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora_mlx import LoraMlx, LoraMlxEmbedding
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes


class DoraMlx(Base):
    PEFT = {"MLX": {"lora_a": "a", "lora_b": "b", "m": "m"}}
    COMBINES: Combination = "alone"
    _inner: Base = LoraMlx()

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if "m" not in shapes:
            return None
        found = self._inner.read(config, module, shapes, where)
        if found is not None and shapes["m"] != self._lengths(shapes):
            raise AdapterError(f"{where}: the three do not go together; save the adapter again")
        return found

    def _lengths(self, shapes: Shapes) -> tuple[int, ...]:
        return (shapes["b"][1],)

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return self._inner.mismatch(shapes, numbers, weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**self._inner.part(arrays, start, stop), "m": arrays["m"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        changed = weight + self._inner.update(weight, arrays, numbers, start)
        changed *= self._ratio(changed, arrays, start)
        changed -= weight
        return changed

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight += self._inner.update(weight, arrays, numbers, start)
        weight *= self._ratio(weight, arrays, start)

    def _ratio(self, changed: Any, arrays: Arrays, start: int) -> Any:
        wanted = arrays["m"][start : start + len(changed), None]
        return (
            (wanted / lengths(changed)).astype(changed.dtype) if _is_numpy(changed) else _torch_ratio(changed, wanted)
        )


class DoraMlxEmbedding(DoraMlx):
    _inner = LoraMlxEmbedding()

    def _lengths(self, shapes: Shapes) -> tuple[int, ...]:
        return (shapes["a"][0],)


def _is_numpy(rows: Any) -> bool:
    return not hasattr(rows, "contiguous")


def lengths(rows: Any) -> Any:
    """The length of each row (n, 1), summed in float64."""
    import numpy as np

    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))[:, None]


def _torch_ratio(changed: Any, wanted: Any) -> Any:
    wide = changed.double()
    return (wanted.double() / wide.square().sum(1, keepdim=True).sqrt()).to(changed.dtype)
