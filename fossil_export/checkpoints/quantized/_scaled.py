"""Codes times scales: fp8, int8 and fp4 weights, of which each block of rows and columns has one scale.

    W[o, j] = (code[o, j] − zero[o // rows, j // columns]) · scale[o // rows, j // columns]

computed in float32 and rounded once to the model's dtype, or first to another one between, as the format's library
does. Codes are 8-bit floats, int8, or two e2m1 floats of 4 bits in a byte, the low half first. The last blocks may be
cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints._rounding import round_to_bfloat16
from fossil_export.checkpoints.quantized._levels import scratch
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

FP8 = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
"""The first code of each that is no finite number."""
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""U8: the exponent of a power of two, plus 127."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SHIFTED = 2.0**120
"""By what a float8_e4m3 is too small if its bits are put where those of a float32 are: their exponents' biases."""
Widen = Callable[["Array", "Array"], None]
"""Writes the values of codes (rows, stored columns) into float32 (rows, width)."""
_BITS = -0x78100000  # as int32: the sign, and where the 7 other bits go


@dataclass(frozen=True)
class Scaled:
    """`codes` (…, out, in), or (…, out, in / 2) if `packed`, whose matrices of `outputs` rows have grids of `scales`,
    one scale for each `block` (rows, columns), all grids one below the other.

    `zeros` are as many as the scales, `overall` is one more factor for all scales (their divisor, if it `divides`).
    Values are rounded to `between` before they are to `dtype`. The rest is how they are quantized again (`_scaling`):
    whole numbers have so many `bits`.
    """

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    dtype: str
    outputs: int
    packed: bool = False
    zeros: TensorInfo | None = None
    overall: TensorInfo | None = None
    divides: bool = False
    between: str = "F32"
    style: str = "span"
    bits: int = 8
    symmetric: bool = True

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(one for one in (self.codes, self.scales, self.zeros, self.overall) if one is not None)

    @property
    def width(self) -> int:
        return self.codes.shape[-1] * (2 if self.packed else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        return -(-self.outputs // self.block[0]), -(-self.width // self.block[1])

    def rows_of_grid(self, start: int, stop: int) -> Array:
        """The row of the scales that each of these rows has."""
        import numpy as np

        numbers = np.arange(start, stop)
        found: Array = numbers // self.outputs * self.grid[0] + numbers % self.outputs // self.block[0]
        return found

    @property
    def unit(self) -> int | None:
        """Rows of one matrix; None if something is told of all of them at once."""
        return None if self.overall is not None else self.outputs

    def part(self, start: int, stop: int) -> Scaled:
        grids = start // self.outputs * self.grid[0], stop // self.outputs * self.grid[0]
        beside = [None if one is None else _rows(one, self.grid[1], *grids) for one in (self.scales, self.zeros)]
        assert beside[0] is not None
        codes = _rows(self.codes, self.codes.shape[-1], start, stop)
        return replace(self, codes=codes, scales=beside[0], zeros=beside[1])

    def encode(self, matrix: Array) -> dict[str, Array]:
        from fossil_export.checkpoints.quantized._scaling import encode

        return encode(self, matrix)

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        at = self.rows_of_grid(start, stop)
        codes = rows_of(_matrix(self.codes, self.codes.shape[-1]), start, stop)  # read as they are decoded
        first_scale, last_scale = int(at[0]), int(at[-1]) + 1
        scales = self._scales(rows_of, first_scale, last_scale)
        at -= first_scale
        zeros = None
        if self.zeros is not None:
            zeros = rows_of(_matrix(self.zeros, self.grid[1]), first_scale, last_scale)[:].astype(np.float32)
        subtract = None if zeros is None or not zeros.any() else Spread(zeros, at, self.block, self.width)
        ways: tuple[Widen, Spread] | None = None

        def values(first: int, last: int, round_in_place: bool) -> Array:
            """In float32; else not rounded yet."""
            nonlocal ways
            own = codes[first:last].view(np.uint8)
            if ways is None:
                widen, factor = self._widener(own, np.inf if subtract else float(np.abs(scales).max(initial=0)))
                ways = widen, Spread(scales * np.float32(factor), at, self.block, self.width)
            widen, multiply = ways
            found = scratch("scaled", (last - first) * self.width, np.float32).reshape(last - first, self.width)
            # All at once: threads wait for each other between short calls.
            with np.errstate(over="ignore", invalid="ignore"):  # the caller sees what is not finite
                widen(own, found)
                if subtract is not None:
                    subtract.apply(np.subtract, found, first, last)
                    if self.between != "F32" and self.codes.dtype != "I8":  # whole numbers of 8 bits are exact
                        found[:] = found.astype(numpy_dtype(self.between))
                multiply.apply(np.multiply, found, first, last)
            if round_in_place:
                round_to_bfloat16(found, scratch("odd", found.size, np.uint32).reshape(found.shape))
            return found

        def decode(first: int, last: int) -> Array:
            found = values(first, last, False)
            with np.errstate(over="ignore", invalid="ignore"):
                rounded = found if self.between == "F32" else found.astype(numpy_dtype(self.between))
                # A copy also if nothing is rounded: the next rows come in the same place.
                return rounded.astype(numpy_dtype(self.dtype))

        def wide(first: int, last: int) -> Array:
            return values(first, last, True)

        if self.dtype == "BF16" and self.between in ("F32", "BF16"):
            decode.wide = wide  # type: ignore[attr-defined]
        return decode

    def _scales(self, rows_of: ReadRows, start: int, stop: int) -> Array:
        import numpy as np

        raw = rows_of(_matrix(self.scales, self.grid[1]), start, stop)[:]
        found: Array = raw.astype(np.float32)
        if self.scales.dtype == "U8":
            found = np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
        if self.overall is not None:
            one = np.float32(rows_of(_matrix(self.overall, 1), 0, 1)[:].astype(np.float32).item())
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                found = found / one if self.divides else found * one
        if not np.isfinite(found).all():
            raise _damaged(self.scales)
        return found

    def _widener(self, codes: Array, largest: float) -> tuple[Widen, float]:
        """What makes float32 of codes like these, and by what the scales, of which the `largest` is told, must be
        multiplied for it."""
        import numpy as np

        if self.packed:
            return lambda codes, out: _take(_halves(), codes, out.view(np.uint64)), 1.0
        if self.codes.dtype == "I8":
            return lambda codes, out: np.copyto(out, codes.view(np.int8)), 1.0
        if self.codes.dtype == "F8_E4M3" and largest < 2.0**7 and _few_tiny(codes) and _shifts_right():
            return self._shift, _SHIFTED
        return self._look_up, 1.0

    def _shift(self, codes: Array, out: Array) -> None:
        self._check(codes)
        _shift(codes, out)

    def _look_up(self, codes: Array, out: Array) -> None:
        import numpy as np

        self._check(codes)
        if codes.size % 2:
            _take(_values(self.codes.dtype), codes, out)
        else:  # two at a time
            pairs = np.ascontiguousarray(codes).reshape(-1).view(np.uint16)
            _take(_pairs(self.codes.dtype), pairs, out.reshape(-1).view(np.uint64))

    def _check(self, codes: Array) -> None:
        if (codes & 127).max(initial=0) >= FP8[self.codes.dtype]:
            raise _damaged(self.codes)


class Spread:
    """Values of a grid, one row of it for each of the rows `at`, for all columns of a block."""

    def __init__(self, grid: Array, at: Array, block: tuple[int, int], width: int) -> None:
        self._at, self._columns, self._width = at, block[1], width
        self._single = grid.shape[1] == 1
        self._by_row = block[0] == 1
        # Rows share a row of the grid: it is laid out once, and taken as it is.
        self._grid = grid if self._single or self._by_row else grid.repeat(block[1], 1)[:, :width]

    def apply(self, operation: Any, values: Array, first: int, last: int) -> None:
        """Rows [first, last), in place."""
        import numpy as np

        own = self._at[first:last]
        if self._single:
            operation(values, self._grid[own], out=values)
        elif self._by_row and self._width % self._columns == 0:
            parted = values.reshape(len(own), -1, self._columns)
            operation(parted, self._grid[own][:, :, None], out=parted)
        elif self._by_row:
            operation(values, self._grid[own].repeat(self._columns, 1)[:, : self._width], out=values)
        else:
            bounds = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), len(own)]
            for start, stop in pairwise(bounds):
                part = values[start:stop]
                operation(part, self._grid[own[start]], out=part)


def _shift(codes: Array, out: Array) -> None:
    """float8_e4m3 codes, but for NaN, as float32 that are `_SHIFTED` times too small."""
    import numpy as np

    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.int32(_BITS), out=bits)


def _shifts_right() -> bool:
    """Whether `_shift` is right here: a processor that was told to take tiny floats as zero gets some wrong."""
    import numpy as np

    values, found = _values("F8_E4M3"), np.empty(256, np.float32)
    _shift(np.arange(256, dtype=np.uint8), found)
    same: bool = np.array_equal((found * np.float32(_SHIFTED))[np.isfinite(values)], values[np.isfinite(values)])
    return same


def _few_tiny(codes: Array) -> bool:
    """Whether hardly any code of float8_e4m3 is below the normal ones: some processors take their time for those."""
    sample = (codes.reshape(-1)[::61] & 127) - 1
    few: bool = (sample < 7).mean() < 1 / 200
    return few


def _take(table: Array, indices: Array, out: Array) -> None:
    # No index is out of bounds: told to clip, NumPy does not look, nor copy.
    table.take(indices, out=out, mode="clip")


@cache
def _values(dtype: str) -> Array:
    """The values of all codes of an 8-bit float."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(stored_dtype(dtype)).astype(np.float32)


@cache
def _pairs(dtype: str) -> Array:
    """Those of two codes, as they lie in memory: 65,536 times two float32."""
    import numpy as np

    return _values(dtype)[np.arange(1 << 16, dtype=np.uint16).view(np.uint8)].view(np.uint64)


@cache
def _halves() -> Array:
    """Those of the two codes of 4 bits in a byte."""
    import numpy as np

    codes, values = np.arange(256), np.array(E2M1, np.float32)
    return np.stack([values[codes & 15], values[codes >> 4]], 1).view(np.uint64).reshape(-1)


def _damaged(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.path}: {info.name} holds infinite or NaN values; the base is damaged, fetch it again"
    )


def _rows(info: TensorInfo, columns: int, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of a tensor as a matrix of so many columns."""
    return slice_of(info, start * columns, (stop - start) * columns, (stop - start, columns))


def _matrix(info: TensorInfo, columns: int) -> TensorInfo:
    """All elements of a tensor, as a matrix of so many columns."""
    count = element_count(info.shape)
    return slice_of(info, 0, count, (count // max(1, columns), columns))
