"""Vectors in blocks of elements that share a scale, as bitsandbytes has them: the last block may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.quantized._levels import dynamic_map, nearest, reciprocal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

NESTED = 256
"""Scales that have one scale of their own, in double quantization."""


def magnitudes(values: Array, block: int) -> Array:
    """The largest magnitude of each block of a float32 vector."""
    import numpy as np

    whole = len(values) // block
    blocks = values[: whole * block].reshape(whole, block)
    found = np.empty(-(-len(values) // block), np.float32)
    np.maximum(blocks.max(1), -blocks.min(1), out=found[:whole])
    if whole < len(found):
        found[whole] = np.abs(values[whole * block :]).max()
    return found


def scale(values: Array, scales: Array, block: int) -> None:
    """Multiply each block of a vector by its scale, in place."""
    whole = len(values) // block
    values[: whole * block].reshape(whole, block)[:] *= scales[:whole, None]
    if whole < len(scales):
        values[whole * block :] *= scales[whole]


@dataclass(frozen=True)
class Nested:
    """Scales that are quantized themselves: the number (uint8) of each in `dynamic_map`, and the scale of each block of
    these."""

    codes: Array
    outer: Array

    def scales(self, table: Array, block: int, offset: np.float32) -> Array:
        """What they stand for, in float32."""
        found: Array = table[self.codes]
        scale(found, self.outer, block)
        found += offset
        return found


def nested(scales: Array, offset: np.float32) -> Nested:
    """Scales less their mean, quantized to 8 bits in blocks of `NESTED`, as bitsandbytes does on CUDA. (Its code for
    CPUs looks the level up at one of 65,536 places, so that a scale between two levels may get the other one.)"""
    import numpy as np

    left = scales - offset
    outer = magnitudes(left, NESTED)
    scale(left, reciprocal(outer), NESTED)
    return Nested(nearest(left, dynamic_map()).astype(np.uint8), outer)
