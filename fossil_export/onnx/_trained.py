"""What an adapter trained, in the forms that graphs take. The modes ask here; no other file of this room calls
`METHODS`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.errors import OnnxError, listed
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.methods import METHODS, LowRank, Tiling
from fossil_export.onnx.graph._match import Piece

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def without_updates(merge: MergePlan) -> MergePlan:
    """The merge with every matrix as it is in the base; what the adapter brought whole stays."""
    files = tuple(
        replace(file, tensors=tuple((replace(tensor, changes=()), offset) for tensor, offset in file.tensors))
        for file in merge.files
    )
    return replace(merge, files=files)


def base_values(merge: MergePlan, name: str) -> Array | None:
    """A stored tensor of the base in float32, None if it has none of that name."""
    info = merge.base.tensors.get(name)
    if info is None:
        return None
    rows_of = partial(view_rows, merge.base.home)
    if info.coding is None and not info.shape:
        return np.asarray(rows_of(replace(info, shape=(1,)), 0, 1), np.float32).reshape(())
    return np.asarray(read_rows(info, 0, info.shape[0], rows_of)[:], np.float32)


def is_the_bases(merge: MergePlan, tensor: TensorPlan) -> bool:
    """Whether a whole tensor that came with the adapter has the base's values: so PEFT saves the weight of a head or an
    embedding that it trained beside."""
    values = base_values(merge, tensor.name) if tensor.owner is not None else None
    return values is not None and np.array_equal(np.asarray(merge.adapter.array(tensor.source), np.float32), values)


def ranks_of(adapter: Adapter, pieces: Iterable[Piece]) -> set[int]:
    return {adapter.trained[piece.module].rank for piece in pieces}


@dataclass(frozen=True)
class Branch:
    """The update of a whole weight of a graph, y = x Wᵀ + down(x) up, in float32: `up` (r, out), and `down` a tiling or
    an array (r, in)."""

    up: Array
    down: Tiling | Array


def branch(adapter: Adapter, pieces: Iterable[Piece], outputs: int, inputs: int) -> Branch:
    """That of a weight (`outputs`, `inputs`) which has these pieces of modules; raises OnnxError for tilings of
    different ranks."""
    found = list(pieces)
    if is_tiling(adapter, found):
        up = joined(adapter, found, outputs)
        return Branch(up, Tiling(len(up)))
    up, down = lora_form(adapter, found, outputs, inputs)
    return Branch(up, down)


def lora_form(adapter: Adapter, pieces: Iterable[Piece], outputs: int, inputs: int) -> tuple[Array, Array]:
    """The same as two arrays, whatever `down` is: B (r, `outputs`), times the scale, and A (r, `inputs`).

    The rows of each piece come after those of the one before, with zeros in B beside its own columns; pieces with the
    same A share its rows. Modules that `adapter` lacks stay zero, of rank 1 if it lacks all.
    """
    downs: list[Array] = []
    ups: list[Array] = []
    for piece in pieces:
        if piece.module not in adapter.trained:
            continue
        form = _low_rank(adapter, adapter.trained[piece.module], piece)
        down = np.asarray(form.down_matrix(inputs), np.float32)
        same = next((at for at, other in enumerate(downs) if np.array_equal(other, down)), len(downs))
        if same == len(downs):
            downs.append(down)
            ups.append(np.zeros((form.rank, outputs), np.float32))
        columns = slice(piece.start, piece.start + piece.count)
        ups[same][:, piece.at : piece.at + piece.count] = np.asarray(form.up).T[:, columns]
    if not downs:
        return np.zeros((1, outputs), np.float32), np.zeros((1, inputs), np.float32)
    return np.concatenate(ups), np.concatenate(downs)


def is_linear(trained: Trained) -> bool:
    """Whether a linear layer reads what it changes: not of a bias, a convolution or an embedding (whose methods have
    names that end so)."""
    is_matrix = trained.dimensions in (2, None) and trained.parameter.endswith(".weight")
    return is_matrix and not trained.method.endswith("embedding")


def is_tiling(adapter: Adapter, pieces: Iterable[Piece]) -> bool:
    """Whether the branch of these pieces sums the inputs, with no weights of its own."""
    return all(is_tiled(adapter.trained[piece.module]) for piece in pieces)


def is_tiled(trained: Trained) -> bool:
    if trained.form_rank is None:
        return False
    # What has the shapes alone tells; no values are read.
    arrays = {role: np.broadcast_to(np.float32(0), shape) for role, shape in trained.shapes.items()}
    form = METHODS[trained.method].low_rank(arrays, trained.numbers, arrays[next(iter(arrays))].shape[-1])
    return form is not None and isinstance(form.down, Tiling)


def joined(adapter: Adapter, pieces: Iterable[Piece], outputs: int, rank: int | None = None) -> Array:
    """D (r, `outputs`) in float32 from the shards of `pieces`; modules that `adapter` lacks stay zero.

    `rank` is needed only where it lacks all of them. Raises OnnxError for shards of different ranks.
    """
    present = [(piece, adapter.trained[piece.module]) for piece in pieces if piece.module in adapter.trained]
    ranks = {trained.form_rank or 1 for _, trained in present} or {rank or 1}
    if len(ranks) > 1:
        names = [piece.module for piece, _ in present]
        raise OnnxError(
            f"{adapter.path}: {listed(names)} lie in one weight of the graph but have ranks {sorted(ranks)}"
        )
    whole = np.zeros((ranks.pop(), outputs), np.float32)
    for piece, trained in present:
        dense = np.asarray(_low_rank(adapter, trained, piece).up.T)
        whole[:, piece.at : piece.at + piece.count] = dense[:, piece.start : piece.start + piece.count]
    return whole


def _low_rank(adapter: Adapter, trained: Trained, piece: Piece) -> LowRank:
    """The form of a whole module in float64, so that what is multiplied is rounded once, where it is put."""
    arrays = {role: np.asarray(adapter.array(info), np.float64) for role, info in trained.tensors.items()}
    for role, values in arrays.items():
        if not np.isfinite(values).all():
            info = trained.tensors[role]
            raise OnnxError(
                f"{info.path}: {info.name} holds infinite or NaN values; training diverged, take an earlier adapter"
            )
    outputs = max(piece.start + piece.count, *(values.shape[-1] for values in arrays.values()))
    form = METHODS[trained.method].low_rank(arrays, trained.numbers, outputs)
    assert form is not None, trained.method  # refused when the plan was made
    return form


def merged_rows(adapter: Adapter, piece: Piece, base: Array) -> Array:
    """The rows of `piece` in float32, of the module's base weight (out, in) with its update added."""
    trained = adapter.trained[piece.module]
    method, start, stop = METHODS[trained.method], piece.start, piece.start + piece.count
    arrays = {
        role: np.asarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)
        for role, array in adapter.arrays(piece.module).items()
    }
    together = method.block_rows(trained.shapes)
    if start % together or stop % together:  # rows of it need others
        merged = np.array(base, np.float32)
        method.add(merged, arrays, trained.numbers, 0)
        return merged[start:stop]
    part = np.array(base[start:stop], np.float32)
    method.add(part, arrays, trained.numbers, start)
    return part


def has_blocks(adapter: Adapter, pieces: Iterable[Piece]) -> bool:
    """Whether the update of a module among them comes in blocks that are multiplied by the weight, as bat's."""
    return any(comes_in_blocks(adapter.trained[piece.module]) for piece in pieces)


def comes_in_blocks(trained: Trained) -> bool:
    return trained.method == "bat"


def blocks(adapter: Adapter, pieces: Iterable[Piece], outputs: int, label: str, graph: Path) -> Array:
    """B (out/r, r, r) of a whole weight of the graph; zeros, which change nothing, where nothing was trained."""
    found = [(piece, adapter.trained[piece.module]) for piece in pieces]
    rank = found[0][1].rank
    whole = np.zeros((outputs // rank, rank, rank), np.float32)
    for piece, trained in found:
        fits = trained.rank == rank and trained.method == "bat"
        if not fits or outputs % rank or piece.at % rank or piece.start % rank:
            raise OnnxError(
                f"{graph}: the blocks of {piece.module} do not fit the packed weight {label}; use --mode merged"
            )
        values = np.asarray(adapter.array(trained.tensors["B"]), np.float32)
        start, count = piece.start // rank, piece.count // rank
        whole[piece.at // rank : piece.at // rank + count] = values[start : start + count]
    return whole
