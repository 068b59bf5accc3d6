"""Tile, the default variant ("balance", "Bone", "MiSS").

    W'[o, j] = W[o, j] + D[j mod r, o]        D (r, out), W (out, in)

for every column j, also where r does not divide `in`. Source: arXiv 2409.15371, section 3, and
`get_delta_weight_miss` in peft/tuners/miss/layer.py.
"""

from __future__ import annotations

from typing import Any

_SPAN = 512
# Columns added at a time: a small r alone would leave the inner loop too short to be worth starting.


def block_rows(shard_shape: tuple[int, ...]) -> int:
    return 1


def mismatch(shard_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> str | None:
    rank, out_features = shard_shape
    if out_features != weight_shape[0]:
        return f"it is made for {out_features} outputs, the weight has {weight_shape[0]}"
    if rank > weight_shape[1]:
        return f"its rank {rank} exceeds the weight's {weight_shape[1]} inputs"
    return None


def part(shard: Any, start: int, stop: int) -> Any:
    return shard[:, start:stop]


def update(weight: Any, shard: Any, start: int) -> Any:
    return tiled(shard_rows(shard, start, len(weight)), weight.shape[1])


def tile_form(shard: Any, outputs: int) -> Any:
    return shard


def merge_rows(weight: Any, shard: Any, start: int) -> None:
    add_tiled(weight, shard_rows(shard, start, len(weight)))


def shard_rows(shard: Any, start: int, count: int) -> Any:
    """D transposed, cut to the outputs of the rows at hand: (count, r)."""
    return shard[:, start : start + count].T


def tiled(rows: Any, width: int) -> Any:
    """Repeat `rows` (n, r) along the columns, cut at `width`: (n, width)."""
    return repeated(rows, -(-width // rows.shape[1]))[:, :width]


def add_tiled(weight: Any, rows: Any) -> None:
    """`weight += tiled(rows, in)` in place, without making the whole of it."""
    count, width = weight.shape
    rank = rows.shape[1]
    wide = repeated(rows, max(1, min(_SPAN, width) // rank))
    span = wide.shape[1]
    body = width - width % span
    view = weight[:, :body].reshape(count, body // span, span)  # splits the last axis: a view
    view += wide[:, None, :]
    weight[:, body:] += wide[:, : width - body]


def repeated(rows: Any, times: int) -> Any:
    if hasattr(rows, "device") and hasattr(rows, "requires_grad"):  # a PyTorch tensor
        return rows.repeat(1, times)
    import numpy as np

    return np.tile(rows, (1, times))
