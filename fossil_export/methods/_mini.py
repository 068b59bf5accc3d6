"""Mini: tile with a narrower shard, repeated along the outputs.

    W'[o, j] = W[o, j] + D[j mod r, o mod m]        D (r, m), W (out, in), out divisible by m (`mini_r`)

Source: `get_delta_weight_miss` in peft/tuners/miss/layer.py with init_weights="mini".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _fossil as fossil
from fossil_export.methods import _tile as tile
from fossil_export.methods._fossil import init_of, peft_keys, ranked
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes, plain
from fossil_export.methods._tile import add_tiled, repeated, tiled

FIELDS = fossil.FIELDS
SHARED = fossil.SHARED
PARAMETER = fossil.PARAMETER
EMPTY = fossil.EMPTY
beside = fossil.beside
COMBINES: Combination = "sum"
PEFT = peft_keys("D")
STATE_DICT: Mapping[str, str] = {}

block_rows = tile.block_rows
dimensions = tile.dimensions
form_rank = tile.form_rank


def read(config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
    if len(shapes["D"]) != 2 or init_of(config) != "mini":
        return None
    rank, found = shapes["D"]
    wanted = config.get("mini_r", fossil.FIELDS["mini_r"].default)
    if found != wanted:
        raise AdapterError(f"{where} has mini_r {found}, but the config says mini_r={wanted}")
    return ranked(rank, config, where)


def mismatch(shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
    rank, mini_r = shapes["D"]
    if weight[0] % mini_r:
        return f"its mini_r {mini_r} does not divide the weight's {weight[0]} outputs"
    if rank > weight[1]:
        return f"its rank {rank} exceeds the weight's {weight[1]} inputs"
    return None


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    shard = arrays["D"]
    return {"D": shard[:, [row % shard.shape[1] for row in range(start, stop)]]}


def update(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
    return tiled(narrow(arrays, numbers, start, len(weight)), weight.shape[1])


@plain
def add(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
    add_tiled(weight, narrow(arrays, numbers, start, len(weight)))


def low_rank(arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank:
    shard = arrays["D"]
    return LowRank(repeated(shard, outputs // shard.shape[1]).T, Tiling(len(shard)))


def narrow(arrays: Arrays, numbers: Numbers, start: int, count: int, out: Any = None) -> Any:
    shard = arrays["D"]
    mini_r = shard.shape[1]
    if start + count <= mini_r:
        return shard[:, start : start + count].T
    return shard.T[[row % mini_r for row in range(start, start + count)]]
