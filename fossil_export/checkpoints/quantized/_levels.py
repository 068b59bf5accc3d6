"""The levels that bitsandbytes rounds to, and which of them a value is rounded to.

Sources: `get_4bit_type` and `create_dynamic_map` in bitsandbytes/functional.py; `dQuantizeNF4`, `dQuantizeFP4` and
`dQuantize` in its csrc/kernels.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""By code."""

FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3))
"""By code: a sign, two bits of exponent and one of mantissa, the largest as one."""

_NF4_BOUNDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)
_FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""Of magnitudes."""

_SHIFT = 19
"""Bits of a float32 that do not tell which two levels it lies between: all but sign, exponent and 4 of the mantissa."""


@dataclass(frozen=True)
class Levels:
    """Sorted `values` of float32, and the `bounds` between them: x is rounded to the value whose number is how many
    bounds are below x. `codes` are what the values are called."""

    values: tuple[float, ...]
    bounds: tuple[float, ...]
    codes: tuple[int, ...]


_INEXACT = {
    **dict.fromkeys((32, 176, 179), -1),
    **dict.fromkeys((98, 104, 296, 458, 488, 520, 648), 1),
}
# By the upper 10 bits of a mantissa whose other bits are 0: by how much the last bit of its reciprocal on CUDA is off.


def reciprocal(scales: Array) -> Array:
    """1 / x in float32, as CUDA has it, and 0 for 0.

    CUDA's (`--use_fast_math`) is wrong in the last bit for some x, which decides where a value lies in the middle
    between two levels: often so for fp4 and int8 of 16-bit weights. What is known of it was seen in weights that were
    quantized on an H200; for all other x this is rounded correctly.
    """
    import numpy as np

    found: Array = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    table = np.zeros(1024, np.int32)
    table[list(_INEXACT)] = list(_INEXACT.values())
    bits = np.ascontiguousarray(scales).view(np.uint32)
    off = table[bits >> 13 & 0x3FF]
    off[bits & 0x1FFF != 0] = 0
    found.view(np.int32)[...] += off
    return found


def _nf4() -> Levels:
    return Levels(NF4, _NF4_BOUNDS, tuple(range(16)))


def _fp4() -> Levels:
    import numpy as np

    order = sorted(range(16), key=lambda code: (FP4[code], code != 8))
    above = np.array(_FP4_BOUNDS, np.float32)
    # A bound itself belongs to the smaller magnitude, and a zero is positive.
    below = np.nextafter(-above, np.float32(-np.inf))[::-1]
    zero = np.nextafter(np.float32(0), np.float32(-1))
    return Levels(tuple(FP4[code] for code in order), tuple(map(float, (*below, zero, *above))), tuple(order))


_LEVELS = {"nf4": _nf4, "fp4": _fp4}


@cache
def _tables(kind: str) -> tuple[Array, Array, Array, Array]:
    """By the upper bits of a float: the bound that is among the floats that have them (infinite if none is), and the
    number of the level below it; then the values and the codes by number."""
    import numpy as np

    levels = _LEVELS[kind]()
    bounds = np.array((*levels.bounds, np.inf), np.float32)
    upper = np.arange(1 << (32 - _SHIFT), dtype=np.uint32) << _SHIFT
    ends = np.stack([upper.view(np.float32), (upper | ((1 << _SHIFT) - 1)).view(np.float32)])
    ends = np.sort(np.where(np.isfinite(ends).all(0), ends, 0), 0)
    low, high = (np.searchsorted(bounds[:-1], end) for end in ends)
    assert (high - low <= 1).all()
    bound = np.where(high > low, bounds[low], np.float32(np.inf))
    return bound, low.astype(np.uint8), np.array(levels.values, np.float32), np.array(levels.codes, np.uint8)


def numbers(kind: str, values: Array) -> Array:
    """Which level (uint8) each value of a float32 vector, from -1 to 1, is rounded to."""
    import numpy as np

    bound, low, _, _ = _tables(kind)
    upper = np.right_shift(values.view(np.uint32), _SHIFT).astype(np.intp)
    found = low.take(upper)
    found += values > bound.take(upper)
    return found


def values_of(kind: str) -> Array:
    """The levels (float32), by number."""
    return _tables(kind)[2]


def codes_of(kind: str) -> Array:
    """The codes (uint8) of the levels, by number."""
    return _tables(kind)[3]


@cache
def dynamic_map() -> Array:
    """The 256 levels (float32, sorted) of scales that are quantized: signed, with an exponent of 0 to 7 bits."""
    import numpy as np

    found = [np.array([0, 1], np.float32)]
    start = float(np.float32(0.1))
    for exponent in range(7):
        # As PyTorch's linspace: a step in float32, from the nearer end, each sum rounded once.
        count = 2**exponent
        step = float(np.float32(1 - start) / np.float32(count))
        numbers = np.arange(count + 1)
        low, high = start + step * numbers, 1 - step * (count - numbers)
        ends = np.where(numbers < (count + 1) // 2, low, high).astype(np.float32)
        means = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [means, -means]
    return np.sort(np.concatenate(found))


def nearest(values: Array, table: Array) -> Array:
    """The number of the nearest of a sorted table; between two, the even number."""
    import numpy as np

    right = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    middle = (table[right - 1] + table[right]) * np.float32(0.5)
    found: Array = right - ((values < middle) | ((values == middle) & (right % 2 == 1)))
    return found
