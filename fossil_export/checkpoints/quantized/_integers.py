"""Whole numbers of a few bits as floats, and back: value = (code − zero) · scale, with a scale for a group of columns.

The difference is exact and the product is rounded once, to the dtype of the scales: as PyTorch computes it in that
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

STEP = 1 << 17
"""Elements that are computed at a time: all that is needed for them stays in a core's cache."""

WORD = 32
"""Bits of the numbers that codes are packed in. 32 codes of n bits are n of them."""

_DOWN = 2.0**-112
# Between the exponents of float32 and float16.


def unpacked(packed: Array, bits: int) -> Array:
    """Codes (n, 8 k / bits), uint8, of rows (n, k) of bytes: streams of bits, the lowest first."""
    import numpy as np

    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.astype(np.uint16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(np.uint8)
    if bits == 2:
        fours = packed.astype(np.uint32)
        fours |= fours << 12
        fours &= 0x000F000F
        fours |= fours << 6
        fours &= 0x03030303
        return fours.view(np.uint8)
    if missing := -packed.shape[1] % bits:  # the last words may be left out
        packed = np.pad(packed, ((0, 0), (0, missing)))
    eights = packed.reshape(len(packed), -1, bits)  # bytes that 8 codes have to themselves
    found = np.empty((*eights.shape[:2], 8), np.uint8)
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        part = eights[..., byte] >> shift
        if shift + bits > 8:
            part |= eights[..., byte + 1] << (8 - shift)
        np.bitwise_and(part, (1 << bits) - 1, out=found[..., number])
    return found.reshape(len(packed), -1)


def packed(codes: Array, bits: int) -> Array:
    """The bytes (n, k bits / 8) of codes (n, k), uint8; k must be a multiple of 8."""
    import numpy as np

    eights = codes.reshape(len(codes), -1, 8)
    found = np.zeros((*eights.shape[:2], bits), np.uint8)
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        found[..., byte] |= eights[..., number] << shift
        if shift + bits > 8:
            found[..., byte + 1] |= eights[..., number] >> (8 - shift)
    return found.reshape(len(codes), -1)


def as_bytes(words: Array) -> Array:
    """Words (n, k) as their bytes (n, 4 k)."""
    import numpy as np

    return np.ascontiguousarray(words).view(np.uint8)


class Steps:
    """The numbers between codes and floats, for some rows of a matrix.

    `scales` (rows, groups), `zeros` (rows, groups) of uint8. `group` is the number of columns that one scale is for, or
    for each column the number of its scale. Values are of the dtype `dtype`, which is that of the scales.
    """

    def __init__(self, scales: Array, zeros: Array, group: int | Array, bits: int, dtype: str) -> None:
        import numpy as np

        self._scales = np.ascontiguousarray(scales, np.float32)
        if (zeros == zeros.flat[0]).all():  # symmetric ones
            zeros = zeros[:1, :1]
        self._zeros = np.ascontiguousarray(zeros, np.uint8)
        self._group, self._bits, self._dtype = group, bits, numpy_dtype(dtype)
        sizes = np.abs(self._scales[self._scales != 0])
        normal = not len(sizes) or bool(sizes.min() >= 2.0**-14 and sizes.max() < 65504 / 256)
        self._halves = dtype == "F16" and normal
        # Products are then zero, or normal numbers of float32 with the exponents of float16. (Smaller ones are exact
        # too, but not in a process that flushes them to zero.)
        self._factors = self._scales * np.float32(_DOWN) if self._halves else self._scales

    def decode(self, start: int, stop: int, codes_of: Callable[[int, int], Array], width: int) -> Array:
        """Rows [start, stop) of `width` columns, whose codes (n, ≥ width), uint8, are read by `codes_of`."""
        import numpy as np

        found = np.empty((stop - start, width), self._dtype)
        step = max(8, STEP // width // 8 * 8)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self._values(codes_of(first, last)[:, :width], first, last, found[first - start : last - start])
        return found

    def _values(self, codes: Array, first: int, last: int, out: Array) -> None:
        import numpy as np

        scales, zeros = self._of_columns(self._factors[first:last]), self._zeros_of(first, last)
        if isinstance(self._group, int):
            codes = codes.reshape(len(codes), -1, self._group)
        narrow = self._bits < 8
        steps = np.subtract(codes, zeros).view(np.int8) if narrow else np.subtract(codes, zeros, dtype=np.int16)
        values = steps.astype(np.float32)
        with np.errstate(over="ignore"):  # the caller sees what is not finite
            values *= scales
            values = values.reshape(out.shape)
            if self._halves:
                _to_halves(values, out)
            else:
                np.copyto(out, values, casting="unsafe")

    def _zeros_of(self, first: int, last: int) -> Array:
        return self._zeros if self._zeros.size == 1 else self._of_columns(self._zeros[first:last])

    def _of_columns(self, of_groups: Array) -> Array:
        # (Not by index: NumPy then leaves columns, not rows, next to each other.)
        return of_groups[:, :, None] if isinstance(self._group, int) else of_groups.take(self._group, axis=1)

    def encode(self, matrix: Array) -> Array:
        """The nearest codes of a matrix (rows, width) in float32, uint8."""
        import numpy as np

        found = np.empty(matrix.shape, np.uint8)
        step = max(1, STEP // matrix.shape[1])
        for first in range(0, len(matrix), step):
            part = matrix[first : first + step]
            scales = self._of_columns(self._scales[first : first + step])
            if isinstance(self._group, int):
                part = part.reshape(len(part), -1, self._group)
            codes = part / np.where(scales == 0, np.float32(1), scales)
            codes += self._zeros_of(first, first + step)
            np.rint(codes, out=codes)
            np.clip(codes, 0, (1 << self._bits) - 1, out=codes)
            found[first : first + step] = codes.reshape(-1, matrix.shape[1])
        return found


def _to_halves(values: Array, out: Array) -> None:
    """Round float32 to float16, to the nearest, ties to even; NumPy's own cast takes four times as long.

    The values are 2⁻¹¹² of what they stand for, and these are zero or normal numbers of float16. `values` is lost.
    """
    import numpy as np

    raw = values.view(np.uint32)
    signs = raw >> 16
    signs &= 0x8000
    raw &= 0x7FFFFFFF
    half = raw >> 13
    half &= 1
    half += 0xFFF
    raw += half
    raw >>= 13
    raw |= signs
    np.copyto(out.view(np.uint16), raw, casting="unsafe")
