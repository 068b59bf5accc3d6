"""Float32 rounded to the dtype of a tensor, and float16 widened, fast, in NumPy."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LARGE = 0x477FF000
"""Bits of the smallest float32 that float16 has no finite number for."""
_NORMAL = 0x38800000
"""Bits of the smallest float32 that is a normal number in float16 too."""


@lru_cache(maxsize=1)
def _halves() -> Array:
    import numpy as np

    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def widened(values: Array) -> Array:
    """Float16 `values` in float32, by a table: NumPy's own cast takes some times as long."""
    import numpy as np

    found: Array = np.take(_halves(), values.view(np.uint16))
    return found


def rounded(values: Array, dtype: str) -> Array:
    """Float32 `values` as `dtype` ("F16", "BF16", "F32"), to nearest, ties to even. The array is given away: it may be
    what is returned, or be written to.

    NumPy's own cast to float16 takes many times what that to bfloat16 takes; the integers here are as exact.
    """
    import numpy as np

    if dtype == "F32":
        return values
    if dtype != "F16":
        narrow: Array = values.astype(numpy_dtype(dtype))
        return narrow
    bits = np.ascontiguousarray(values).view(np.uint32)
    signs = np.right_shift(bits, 16).astype(np.uint16)
    signs &= 0x8000
    bits &= 0x7FFFFFFF
    if bits.size and bits.max() >= _LARGE:
        with np.errstate(over="ignore", invalid="ignore"):
            found: Array = bits.view(np.float32).astype(np.float16)
        found.view(np.uint16)[...] |= signs
        return found
    small = bits < _NORMAL
    # Added to 0.5, a number below the normal ones is rounded to what float16 has of it, in the lowest bits.
    subnormal = (bits.view(np.float32) + np.float32(0.5)).view(np.uint32) if small.any() else None
    odd = np.right_shift(bits, 13)
    odd &= 1
    bits += odd
    bits += np.uint32(0x0FFF - (112 << 23) & 0xFFFFFFFF)
    bits >>= 13
    result = bits.astype(np.uint16)
    if subnormal is not None:
        np.copyto(result, subnormal.astype(np.uint16), where=small)
    result |= signs
    found = result.view(np.float16)
    return found


def round_to_bfloat16(values: Array, odd: Array) -> None:
    """Float32 `values`, none of them NaN, to the nearest that bfloat16 has, ties to even, in place; `odd` is memory."""
    import numpy as np

    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    odd += np.uint32(0x7FFF)
    bits += odd
    bits &= np.uint32(0xFFFF0000)
