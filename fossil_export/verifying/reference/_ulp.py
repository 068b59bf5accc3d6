"""How far apart the numbers of a dtype are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MANTISSA = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Significant bits of each dtype, the hidden one included."""

SMALLEST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}
"""Exponent of the smallest normal number, under which the steps stop shrinking."""


def ulp(values: Array, dtype: str, out: Array) -> Array:
    """The distance between neighbours of `dtype` (an ulp) at each of `values` (float64), written to `out`."""
    import numpy as np

    # The exponent bits alone are 2^floor(log2 |value|).
    np.bitwise_and(values.view(np.int64), 0x7FF0000000000000, out=out.view(np.int64))
    np.maximum(out, 2.0 ** SMALLEST[dtype], out=out)
    out *= 2.0 ** (1 - MANTISSA[dtype])
    return out


def step(exact: Array, got: Array, dtype: str, out: Array, space: Array) -> Array:
    """The ulp at each of `exact` (float64) on the side where `got` lies, written to `out`; `space` is overwritten.

    Just below a power of two the neighbours lie half as far apart as at it and above.
    """
    import numpy as np

    np.abs(exact, out=out)
    np.minimum(np.abs(got, out=space), out, out=space)
    out *= 0.5
    return ulp(np.maximum(space, out, out=out), dtype, out)
