"""Tile, the default variant ("balance", "Bone", "MiSS").

    W'[o, j] = W[o, j] + D[j mod r, o]        D (r, out), W (out, in)

for every column j, also where r does not divide `in`. Source: arXiv 2409.15371, section 3, and
`get_delta_weight_miss` in peft/tuners/miss/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _fossil as fossil
from fossil_export.methods._fossil import init_of, peft_keys, ranked, state_dict_keys
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes, plain

FIELDS = fossil.FIELDS
SHARED = fossil.SHARED
PARAMETER = fossil.PARAMETER
EMPTY = fossil.EMPTY
beside = fossil.beside
COMBINES: Combination = "sum"
PEFT = peft_keys("D")
STATE_DICT = state_dict_keys("D")

_SPAN = 512
# Columns added at a time: a small r alone would leave the inner loop too short to be worth starting.


def read(config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
    dimensions = len(shapes["D"])
    if dimensions not in (2, 3):
        raise AdapterError(f"{where} has {dimensions} dimensions, expected 2 (tile, mini) or 3 (bat)")
    if dimensions == 3 or init_of(config) == "mini":
        return None
    if init_of(config) == "bat":
        raise AdapterError(
            f"{where} is 2-dimensional, a tile shard, but the config says init_weights='bat'; mend the config"
        )
    return ranked(shapes["D"][0], config, where)


def dimensions(shapes: Shapes) -> int:
    return 2


def block_rows(shapes: Shapes) -> int:
    return 1


def mismatch(shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
    rank, out_features = shapes["D"]
    if out_features != weight[0]:
        return f"it is made for {out_features} outputs, the weight has {weight[0]}"
    if rank > weight[1]:
        return f"its rank {rank} exceeds the weight's {weight[1]} inputs"
    return None


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"D": arrays["D"][:, start:stop]}


def update(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
    return tiled(narrow(arrays, numbers, start, len(weight)), weight.shape[1])


@plain
def add(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
    add_tiled(weight, narrow(arrays, numbers, start, len(weight)))


def form_rank(shapes: Shapes) -> int:
    return shapes["D"][0]


def low_rank(arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank:
    return LowRank(arrays["D"].T, Tiling(len(arrays["D"])))


def narrow(arrays: Arrays, numbers: Numbers, start: int, count: int, out: Any = None) -> Any:
    """D transposed, cut to the outputs of the rows at hand: (count, r)."""
    return arrays["D"][:, start : start + count].T


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
