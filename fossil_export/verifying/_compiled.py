"""Rows that were stored against what they must be, by the loops of compare.c."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fossil_export.kernels import library
from fossil_export.verifying._job import Sums
from fossil_export.verifying._values import ALLOWED, LANES, SAMPLED

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
"""By NumPy's names, the numbers that they have in compare.c; rows of float64 are for NumPy."""


WIDE = 1 << 16
"""Products that are taken in float64 at a time."""


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("stride", ctypes.c_int64))


class _Found(ctypes.Structure):
    _fields_ = (
        ("worst", ctypes.c_int64),
        ("asked", ctypes.c_int64),
        ("kept", ctypes.c_double * LANES),
        ("update", ctypes.c_double * LANES),
        ("phase", ctypes.c_int64),
        ("sampled", ctypes.c_int64),
    )

    @property
    def sums(self) -> Sums | None:
        """None if something is wrong: NumPy tells what."""
        worst = struct.unpack("d", struct.pack("q", self.worst))[0]
        return Sums(worst, 0, sum(self.kept, 0.0), sum(self.update, 0.0)) if worst <= ALLOWED else None


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("near", "left", "right", "plus", "left_sizes", "right_sizes", "exact")),
        *(
            (name, ctypes.c_int64)
            for name in ("rank", "period", "block", "left_stride", "left_blocks", "first", "asks")
        ),
        ("scale", ctypes.c_double),
    )


@lru_cache(maxsize=1)
def loops() -> Any | None:
    """The library with the types of its functions; None without one."""
    found = library()
    if found is None or not hasattr(found, "fossil_compare_tiled"):
        return None
    rows, size, pointer = ctypes.POINTER(_Rows), ctypes.c_int64, ctypes.c_void_p
    result = ctypes.POINTER(_Found)
    found.fossil_same.argtypes = (pointer, pointer, ctypes.c_size_t)
    found.fossil_same.restype = ctypes.c_int32
    found.fossil_compare_tiled.argtypes = (rows, rows, pointer, size, size, size, size, size, result)
    found.fossil_compare_rebuilt.argtypes = (rows, rows, pointer, pointer, size, size, result)
    found.fossil_compare_multiplied.argtypes = (rows, rows, ctypes.POINTER(_Product), size, size, result)
    for name in ("tiled", "rebuilt", "multiplied"):
        getattr(found, f"fossil_compare_{name}").restype = None
    return found


def are_same(one: Array, other: Array) -> bool | None:
    """Whether two arrays have the same bytes; None without the library."""
    found = loops()
    return None if found is None else bool(found.fossil_same(one.ctypes.data, other.ctypes.data, one.nbytes))


def is_known(*arrays: Array) -> bool:
    """Whether the loops can read the dtypes of these."""
    return loops() is not None and all(array.dtype.name in DTYPES for array in arrays)


def _rows(array: Array) -> _Rows:
    assert array.flags.c_contiguous, array.strides
    return _Rows(array.ctypes.data, DTYPES[array.dtype.name], array.strides[0])


def tiled(start: int, stored: Array, found: Array, tile: Array, offset: int) -> Sums | None:
    """Of rows (n, in) that begin at row `start`, with `tile` (m, r) in float32: W[o, j] + tile[(offset + o) mod m, j
    mod r]."""
    result = _Found(phase=start, sampled=SAMPLED)
    loops().fossil_compare_tiled(  # type: ignore[union-attr]
        _rows(stored), _rows(found), tile.ctypes.data, len(tile), tile.shape[1], offset, *found.shape, result
    )
    return result.sums


def rebuilt(start: int, stored: Array, found: Array, exact: Array, bound: Array | None) -> Sums | None:
    """Of rows (n, in) whose W' (n, in) was computed in float64, with a bound as `Exact.rebuild` has it."""
    result = _Found(phase=start, sampled=SAMPLED)
    at = None if bound is None else bound.ctypes.data
    loops().fossil_compare_rebuilt(_rows(stored), _rows(found), exact.ctypes.data, at, *found.shape, result)  # type: ignore[union-attr]
    return result.sums


class Factor:
    """The factor `right` (m, r) in float32 of products with its transpose, the lengths of its rows, and itself in
    float64."""

    def __init__(self, right: Array) -> None:
        import numpy as np

        self.right = np.ascontiguousarray(right, np.float32)
        self.sizes = lengths(self.right)
        self._wide: Array | None = None
        self._lock = threading.Lock()

    @property
    def wide(self) -> Array:
        import numpy as np

        with self._lock:
            if self._wide is None:
                self._wide = self.right.astype(np.float64)
        return self._wide


def lengths(rows: Array) -> Array:
    """The lengths (…) of rows (…, r) of float32, in float32; too large rather than too small, and 0 of zeros alone."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        found = np.sqrt(np.einsum("...i,...i->...", rows, rows, dtype=np.float64)) * (1 + 2.0**-20)
        larger: Array = found.astype(np.float32) + (found != 0) * np.float32(2.0**-126)
        return larger


def multiplied(
    start: int,
    stored: Array,
    found: Array,
    left: Array,
    factor: Factor,
    scale: float,
    buffer: Callable[[str, int], Array],
    *,
    blocks: bool = False,
) -> Sums | None:
    """Of rows (n, in) with W + scale · left · rightᵀ; of `blocks` with W + W rightᵀ + rightᵀ in blocks (r, r), of which
    these are one row, and `left` is W in float32."""
    import numpy as np

    count, width = found.shape
    rank = factor.right.shape[1]
    rows = left.reshape(-1, rank) if blocks else left
    sizes = lengths(rows)
    plus = np.ascontiguousarray(factor.right.T) if blocks else None
    product = _Product(
        left=left.ctypes.data,
        right=factor.right.ctypes.data,
        plus=None if plus is None else plus.ctypes.data,
        left_sizes=sizes.ctypes.data,
        right_sizes=factor.sizes.ctypes.data,
        rank=rank,
        period=rank if blocks else width,
        block=rank if blocks else 0,
        left_stride=left.shape[1],
        left_blocks=width // rank if blocks else 1,
        scale=scale,
    )
    # Where the steps are as fine as float32's own errors, all products are taken in float64.
    if found.dtype != np.float32:
        near = buffer("near", 4 * found.size).view(np.float32).reshape(len(rows), -1)
        with np.errstate(all="ignore"):
            np.matmul(rows, factor.right.T, out=near)
        product.near, product.asks = near.ctypes.data, found.size // 256 + 2 * count
        result = _Found(phase=start, sampled=SAMPLED)
        loops().fossil_compare_multiplied(_rows(stored), _rows(found), product, count, width, result)  # type: ignore[union-attr]
        if result.asked <= product.asks:
            return result.sums
    product.near, product.asks = None, found.size
    total = Sums()
    step = max(1, WIDE // width)
    for first in range(0, count, step):
        some = slice(first, first + step)
        own = (left[some].reshape(-1, rank) if blocks else left[some]).astype(np.float64)
        exact = buffer("near", 8 * found[some].size).view(np.float64).reshape(len(own), -1)
        with np.errstate(all="ignore"):
            np.matmul(own, factor.wide.T, out=exact)
        product.exact, product.first = exact.ctypes.data, first
        product.left = left[some].ctypes.data
        product.left_sizes = sizes[first * product.left_blocks :].ctypes.data
        result = _Found(phase=start + first, sampled=SAMPLED)
        rest = _rows(stored[some]), _rows(found[some])
        loops().fossil_compare_multiplied(*rest, product, len(found[some]), width, result)  # type: ignore[union-attr]
        sums = result.sums
        if sums is None:
            return None
        total += sums
    return total
