"""The mathematics a second time, on its own: float64, by index, from the paper's formulas.

Nothing here is shared with `methods/`: what merged the weights must not be what checks them. Formulas and
names of the variants: arXiv 2409.15371 and FOSSIL's entry in PEFT (peft/tuners/miss/layer.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MANTISSA = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Significant bits of each dtype, the hidden one included."""

SMALLEST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}
"""Exponent of the smallest normal number, under which the steps stop shrinking."""


def rebuild(variant: str, weight: Array, shard: Array, start: int, exact: Array) -> Array | None:
    """Write the exact W' for rows of W into `exact`, and return a bound on float32's error in it.

    `weight` and `exact` (n, in) and `shard` are float64; the first row of `weight` is row `start` of the
    whole. The bound is None for tile and mini, whose float32 sum has a single rounding; for bat, a product
    of r terms each, it is the standard one: (r + 2) u (|W| + |W||B| + |B|) with u = 2^-24.
    """
    import numpy as np

    count, width = weight.shape
    if variant in ("tile", "mini"):
        rank, outs = shard.shape
        # For tile `outs` is the number of outputs, and the remainder changes nothing.
        by_output = shard.T[np.arange(start, start + count) % outs]
        np.take(by_output, np.arange(width) % rank, axis=1, out=exact, mode="clip")
        exact += weight
        return None
    rank = shard.shape[1]
    size = np.empty_like(weight)
    for block in range(start // rank, (start + count) // rank):
        rows = slice(block * rank - start, (block + 1) * rank - start)
        mixing = shard[block]
        for column in range(0, width, rank):
            part = weight[rows, column : column + rank]
            exact[rows, column : column + rank] = part + part @ mixing + mixing
            size[rows, column : column + rank] = np.abs(part) + np.abs(part) @ np.abs(mixing) + np.abs(mixing)
    size *= (rank + 2) * 2.0**-24
    return size


def step(values: Array, dtype: str, out: Array) -> Array:
    """The distance between neighbours of `dtype` (an ulp) at each of `values` (float64), written to `out`."""
    import numpy as np

    # The exponent bits alone are 2^floor(log2 |value|).
    np.bitwise_and(values.view(np.int64), 0x7FF0000000000000, out=out.view(np.int64))
    np.maximum(out, 2.0 ** SMALLEST[dtype], out=out)
    out *= 2.0 ** (1 - MANTISSA[dtype])
    return out
