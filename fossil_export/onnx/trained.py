"""What an adapter trained, in the forms that graphs take. The modes ask here; no other file of this room calls
`METHODS`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter, Shard
from fossil_export.errors import OnnxError, listed
from fossil_export.merging.layout import TensorPlan
from fossil_export.merging.plan import MergePlan
from fossil_export.methods import METHODS
from fossil_export.onnx.builders import PRECISIONS
from fossil_export.onnx.graph.match import Piece
from fossil_export.onnx.modes import MODES

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def check_mode(adapter: Adapter, mode: str, precision: str | None = None) -> None:
    """Raise OnnxError for what can be refused before a graph is made."""
    if mode not in MODES:
        raise OnnxError(f"mode is {mode!r}, expected {', '.join(MODES)}")
    if MODES[mode].low_rank and any(shard.variant == "bat" for shard in adapter.shards.values()):
        raise OnnxError(
            f"{adapter.path}: is a bat adapter, whose update depends on the weight it changes and is no branch beside "
            "it; use --mode tiled or merged, or approximate it by a LoRA"
        )
    codes = precision in PRECISIONS and PRECISIONS[precision].codes
    if codes and MODES[mode].floats and not MODES[mode].merges:
        raise OnnxError(
            f"--mode {mode} adds to float weights, and {precision} weights are codes; use --mode fused or swappable, "
            "or --mode merged, which quantizes the merged weights"
        )


def trained_modules(merge: MergePlan) -> Iterator[tuple[str, TensorPlan]]:
    """Every trained module of a merge and the weight that its update is for."""
    for tensor in merge.tensors:
        if tensor.shard is not None:
            yield tensor.shard.module, tensor


def without_updates(tensor: TensorPlan) -> TensorPlan:
    """The tensor as it is in the base, or as the adapter brought it whole."""
    return replace(tensor, shard=None)


def ranks_of(adapter: Adapter, pieces: Iterable[Piece]) -> set[int]:
    return {adapter.shards[piece.module].rank for piece in pieces}


def joined(adapter: Adapter, pieces: Iterable[Piece], outputs: int, rank: int | None = None) -> Array:
    """D (r, `outputs`) in float32 from the shards of `pieces`; modules that `adapter` lacks stay zero.

    `rank` is needed only where it lacks all of them. Raises OnnxError for shards of different ranks.
    """
    present = [(piece, adapter.shards[piece.module]) for piece in pieces if piece.module in adapter.shards]
    ranks = {shard.rank for _, shard in present} or {rank or 1}
    if len(ranks) > 1:
        names = [piece.module for piece, _ in present]
        raise OnnxError(
            f"{adapter.path}: {listed(names)} lie in one weight of the graph but have ranks {sorted(ranks)}"
        )
    whole = np.zeros((ranks.pop(), outputs), np.float32)
    for piece, shard in present:
        dense = tile_form(adapter, shard, piece)
        whole[:, piece.at : piece.at + piece.count] = dense[:, piece.start : piece.start + piece.count]
    return whole


def tile_form(adapter: Adapter, shard: Shard, piece: Piece) -> Array:
    """D (r, out) of a whole module in float32."""
    values = np.asarray(adapter.array(shard.tensor), np.float32)
    if not np.isfinite(values).all():
        raise OnnxError(f"{shard.tensor.path}: {shard.tensor.name} holds infinite or NaN values; training diverged")
    outputs = max(piece.start + piece.count, values.shape[-1])
    dense = METHODS[shard.variant].tile_form(values, outputs)
    assert dense is not None, shard.variant  # refused when the plan was made
    return np.asarray(dense)


def merged_rows(adapter: Adapter, piece: Piece, base: Array) -> Array:
    """The rows of `piece` in float32, of the module's base weight (out, in) with its update added."""
    part = np.array(base[piece.start : piece.start + piece.count], np.float32)
    shard = adapter.shards[piece.module]
    METHODS[shard.variant].merge_rows(part, np.asarray(adapter.array(shard.tensor), np.float32), piece.start)
    return part


def has_blocks(adapter: Adapter, pieces: Iterable[Piece]) -> bool:
    """Whether a module among them was trained in blocks (bat)."""
    return any(adapter.shards[piece.module].variant == "bat" for piece in pieces)


def blocks(adapter: Adapter, pieces: Iterable[Piece], outputs: int, label: str, graph: Path) -> Array:
    """B (out/r, r, r) of a whole weight of the graph; zeros, which change nothing, where nothing was trained."""
    shards = [(piece, adapter.shards[piece.module]) for piece in pieces]
    rank = shards[0][1].rank
    whole = np.zeros((outputs // rank, rank, rank), np.float32)
    for piece, shard in shards:
        if shard.rank != rank or shard.variant != "bat" or outputs % rank or piece.at % rank or piece.start % rank:
            raise OnnxError(
                f"{graph}: the blocks of {piece.module} do not fit the packed weight {label}; use --mode merged"
            )
        values = np.asarray(adapter.array(shard.tensor), np.float32)
        start, count = piece.start // rank, piece.count // rank
        whole[piece.at // rank : piece.at // rank + count] = values[start : start + count]
    return whole
