"""What the trained tensors mean: one file per variant, one entry in `METHODS`.

Each module states its formula once, in its docstring, and implements `Method`. The arrays may be NumPy
arrays or PyTorch tensors; the code uses only what both understand, so one formula serves CPU and GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

from fossil_export.methods import bat, mini, tile


class Method(Protocol):
    """What a variant must know to be merged. Shapes: weight rows (n, in), out of a weight (out, in)."""

    def block_rows(self, shard_shape: tuple[int, ...]) -> int:
        """Rows of the weight that must be merged together; slabs are cut at multiples of it."""

    def mismatch(self, shard_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> str | None:
        """Why a shard of this shape cannot belong to a weight of that shape; None when it can."""

    def part(self, shard: Any, start: int, stop: int) -> Any:
        """What rows [start, stop) need of `shard`: for them it is the shard of a weight that begins at row `start`."""

    def update(self, weight: Any, shard: Any, start: int) -> Any:
        """ΔW (n, in) for the rows `weight` (n, in), the first of which is row `start` of the whole weight."""

    def tile_form(self, shard: Any, outputs: int) -> Any | None:
        """D (r, out) whose tiling is the same update, W' = W + tile(D), or y = W x + S(x) D without touching W;
        None for a variant whose update depends on the weight. S(x)[k] = sum of x[j] over j with j mod r == k."""

    def merge_rows(self, weight: Any, shard: Any, start: int) -> None:
        """Add ΔW to `weight` (n, in) in place; `start` as for `update`. Same bits as `weight += update(...)`."""


METHODS: dict[str, Method] = {"tile": tile, "mini": mini, "bat": bat}

__all__ = ["METHODS", "Method"]
