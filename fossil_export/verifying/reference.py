"""The mathematics a second time, on its own: float64, by index, from the paper's formulas.

Nothing here is shared with `methods/`: what merged the weights must not be what checks them. Formulas and
names of the variants: arXiv 2409.15371 and FOSSIL's entry in PEFT (peft/tuners/miss/layer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MANTISSA = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Significant bits of each dtype, the hidden one included."""

SMALLEST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}
"""Exponent of the smallest normal number, under which the steps stop shrinking."""


@dataclass(frozen=True)
class Exact:
    """One variant, in float64.

    `unit` is the number of rows that are rebuilt together, by the shard's shape. `part` is what rows [start, stop)
    need of a shard; for tile and mini that is D (r, n), a column for each row. `rebuild` writes the exact W' for rows
    of W (n, in) and their part of the shard into a third array (n, in), and returns a bound on float32's error in it:
    None where the float32 sum has a single rounding.
    """

    unit: Callable[[tuple[int, ...]], int]
    part: Callable[[Any, int, int], Array]
    rebuild: Callable[[Array, Array, Array], Array | None]


def _tile_part(shard: Any, start: int, stop: int) -> Any:
    return shard[:, start:stop]


def _mini_part(shard: Any, start: int, stop: int) -> Any:
    import numpy as np

    return shard[:, np.arange(start, stop) % shard.shape[1]]


def _bat_part(shard: Any, start: int, stop: int) -> Any:
    rank = shard.shape[1]
    return shard[start // rank : stop // rank]


def _tiled(weight: Array, part: Array, exact: Array) -> None:
    """W'[o, j] = W[o, j] + D[j mod r, o]."""
    import numpy as np

    np.take(part.T, np.arange(weight.shape[1]) % len(part), axis=1, out=exact, mode="clip")
    exact += weight


def _bat(weight: Array, part: Array, exact: Array) -> Array:
    """W'[b, a] = W[b, a] + W[b, a] B[b] + B[b]; the bound for a product of r terms each is the standard one,
    (r + 2) u (|W| + |W||B| + |B|) with u = 2^-24."""
    import numpy as np

    count, width = weight.shape
    rank = part.shape[1]
    size = np.empty_like(weight)
    for block in range(count // rank):
        rows = slice(block * rank, (block + 1) * rank)
        mixing = part[block]
        for column in range(0, width, rank):
            at = weight[rows, column : column + rank]
            exact[rows, column : column + rank] = at + at @ mixing + mixing
            size[rows, column : column + rank] = np.abs(at) + np.abs(at) @ np.abs(mixing) + np.abs(mixing)
    size *= (rank + 2) * 2.0**-24
    return size


def _one_row(shape: tuple[int, ...]) -> int:
    return 1


EXACT: dict[str, Exact] = {
    "tile": Exact(_one_row, _tile_part, _tiled),
    "mini": Exact(_one_row, _mini_part, _tiled),
    "bat": Exact(lambda shape: shape[1], _bat_part, _bat),
}
"""By variant. One that is not here cannot be checked: a KeyError, never another one's formula."""


def step(values: Array, dtype: str, out: Array) -> Array:
    """The distance between neighbours of `dtype` (an ulp) at each of `values` (float64), written to `out`."""
    import numpy as np

    # The exponent bits alone are 2^floor(log2 |value|).
    np.bitwise_and(values.view(np.int64), 0x7FF0000000000000, out=out.view(np.int64))
    np.maximum(out, 2.0 ** SMALLEST[dtype], out=out)
    out *= 2.0 ** (1 - MANTISSA[dtype])
    return out
