"""Bat, the variant whose update depends on the weight.

    W'[b, a] = W[b, a] + W[b, a] B[b] + B[b]        B (out/r, r, r); W cut into blocks (r, r): b along out, a along in

r must divide both `in` and `out`. Source: arXiv 2409.15371 (the nonlinear variant) and `get_delta_weight`
in peft/tuners/miss/layer.py.
"""

from __future__ import annotations

from typing import Any


def block_rows(shard_shape: tuple[int, ...]) -> int:
    return shard_shape[1]


def mismatch(shard_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> str | None:
    blocks, rank, _ = shard_shape
    if blocks * rank != weight_shape[0]:
        return f"it is made for {blocks * rank} outputs, the weight has {weight_shape[0]}"
    if weight_shape[1] % rank:
        return f"its rank {rank} does not divide the weight's {weight_shape[1]} inputs"
    return None


def part(shard: Any, start: int, stop: int) -> Any:
    return shard[start // shard.shape[1] : stop // shard.shape[1]]


def update(weight: Any, shard: Any, start: int) -> Any:
    count, width = weight.shape
    rank = shard.shape[1]
    blocks = shard[start // rank : (start + count) // rank]
    product = weight.reshape(len(blocks), count * width // len(blocks) // rank, rank) @ blocks
    # Row i of a block gets row i of B under every column block a.
    by_row = product.reshape(len(blocks), rank, width // rank, rank)
    by_row += blocks[:, :, None, :]
    return by_row.reshape(count, width)


def tile_form(shard: Any, outputs: int) -> None:
    return None


def merge_rows(weight: Any, shard: Any, start: int) -> None:
    weight += update(weight, shard, start)
