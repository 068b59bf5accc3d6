"""Bat, the variant whose update depends on the weight.

    W'[b, a] = W[b, a] + W[b, a] B[b] + B[b]        B (out/r, r, r); W cut into blocks (r, r): b along out, a along in

r must divide both `in` and `out`. Source: arXiv 2409.15371 (the nonlinear variant) and `get_delta_weight`
in peft/tuners/miss/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _fossil as fossil
from fossil_export.methods._fossil import init_of, peft_keys, ranked, state_dict_keys
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes, plain

FIELDS = fossil.FIELDS
SHARED = fossil.SHARED
PARAMETER = fossil.PARAMETER
EMPTY = fossil.EMPTY
beside = fossil.beside
COMBINES: Combination = "order"
PEFT = peft_keys("B")
STATE_DICT = state_dict_keys("B")

_ROWS = 64
# Rows that are merged together at most: a slab of whole blocks of r = 512 would take 29 MB of a Llama of 70B.


def read(config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
    if len(shapes["B"]) != 3:
        return None
    init = init_of(config)
    if config and init != "bat" and not (config["peft_type"] == "BONE" and init is True):
        raise AdapterError(
            f"{where} is 3-dimensional, a bat shard, but the config says init_weights={init!r}; mend the config"
        )
    if shapes["B"][1] != shapes["B"][2]:
        raise AdapterError(f"{where} should be (out/r, r, r), but its last two sizes differ")
    return ranked(shapes["B"][1], config, where)


def dimensions(shapes: Shapes) -> int:
    return 2


def block_rows(shapes: Shapes) -> int:
    """A whole block, or of a large one a part: its rows do not need each other."""
    rank = shapes["B"][1]
    return next(count for count in range(min(rank, _ROWS), 0, -1) if rank % count == 0)


def period(shapes: Shapes) -> int:
    """Rows with one block of B."""
    return shapes["B"][1]


def mismatch(shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
    blocks, rank, _ = shapes["B"]
    if blocks * rank != weight[0]:
        return f"it is made for {blocks * rank} outputs, the weight has {weight[0]}"
    if weight[1] % rank:
        return f"its rank {rank} does not divide the weight's {weight[1]} inputs"
    return None


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    blocks = arrays["B"]
    rank = blocks.shape[1]
    if start % rank == stop % rank == 0:
        return {"B": blocks[start // rank : stop // rank]}
    number = start // rank  # rows within one block
    own = blocks[number : number + 1]
    return {"B": own, "rows": own[0][start - number * rank : stop - number * rank]}


def update(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
    count, width = weight.shape
    rank = arrays["B"].shape[1]
    if "rows" in arrays:
        return _within(weight, arrays["B"][0], arrays["rows"][start : start + count])
    if start % rank or count % rank:
        number, first = divmod(start, rank)
        found = weight + 0
        at = 0
        while at < count:
            size = min(rank - first, count - at)
            block = arrays["B"][number]
            found[at : at + size] = _within(weight[at : at + size], block, block[first : first + size])
            number, first, at = number + 1, 0, at + size
        return found
    blocks = arrays["B"][start // rank : (start + count) // rank]
    product = weight.reshape(len(blocks), count * width // len(blocks) // rank, rank) @ blocks
    # Row i of a block gets row i of B under every column block a.
    by_row = product.reshape(len(blocks), rank, width // rank, rank)
    by_row += blocks[:, :, None, :]
    return by_row.reshape(count, width)


def _within(weight: Any, block: Any, rows: Any) -> Any:
    """The update of rows of one block, with their rows of B."""
    count, width = weight.shape
    rank = len(block)
    by_row = (weight.reshape(-1, rank) @ block).reshape(count, width // rank, rank)
    by_row += rows[:, None, :]
    return by_row.reshape(count, width)


@plain
def add(weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
    weight += update(weight, arrays, numbers, start)


def form_rank(shapes: Shapes) -> None:
    return None


def low_rank(arrays: Arrays, numbers: Numbers, outputs: int) -> None:
    return None
