"""Mini: tile with a narrower shard, repeated along the outputs.

    W'[o, j] = W[o, j] + D[j mod r, o mod m]        D (r, m), W (out, in), out divisible by m (`mini_r`)

Source: `get_delta_weight_miss` in peft/tuners/miss/layer.py with init_weights="mini".
"""

from __future__ import annotations

from typing import Any

from fossil_export.methods.tile import add_tiled, block_rows, repeated, tiled

__all__ = ["block_rows", "merge_rows", "mismatch", "part", "tile_form", "update"]


def mismatch(shard_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> str | None:
    rank, mini_r = shard_shape
    if weight_shape[0] % mini_r:
        return f"its mini_r {mini_r} does not divide the weight's {weight_shape[0]} outputs"
    if rank > weight_shape[1]:
        return f"its rank {rank} exceeds the weight's {weight_shape[1]} inputs"
    return None


def part(shard: Any, start: int, stop: int) -> Any:
    return shard[:, [row % shard.shape[1] for row in range(start, stop)]]


def update(weight: Any, shard: Any, start: int) -> Any:
    return tiled(_shard_rows(shard, start, len(weight)), weight.shape[1])


def tile_form(shard: Any, outputs: int) -> Any:
    return repeated(shard, outputs // shard.shape[1])


def merge_rows(weight: Any, shard: Any, start: int) -> None:
    add_tiled(weight, _shard_rows(shard, start, len(weight)))


def _shard_rows(shard: Any, start: int, count: int) -> Any:
    mini_r = shard.shape[1]
    return shard.T[[row % mini_r for row in range(start, start + count)]]
