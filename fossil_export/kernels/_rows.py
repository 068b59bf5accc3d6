"""Rows of floats merged, cast and measured in one pass by the library; None of a function says that it does not take
these arrays, or is not there."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from fossil_export.kernels import library

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}

_BLOCK = 1 << 16
# Elements of rows that lie another way round which are put in order at a time.


def merge_rows(rows: Array, out: Array, update: Array | None = None) -> bool | None:
    """`out` = round(`rows` + `update`), computed in float32, of rows (n, in) and an update (n, in) of float32, or one
    (n, r) that is repeated along the columns and cut at `in`.

    Returns whether all of `out` (contiguous, no memory of `rows`) is finite. What is NaN is not kept as such: then the
    caller makes it anew.
    """
    kernels, source, target = library(), _DTYPES.get(rows.dtype.name), _DTYPES.get(out.dtype.name)
    if kernels is None or source is None or target is None or not out.flags.c_contiguous:
        return None
    if update is not None and (update.dtype.name != "float32" or len(update) != len(rows) or update.shape[1] == 0):
        return None
    count, width = rows.shape
    if rows.size == 0:
        return True
    if width > 1 and rows.strides[1] != rows.itemsize:
        import numpy as np

        step, finite = max(1, _BLOCK // width), True
        for start in range(0, count, step):
            span = slice(start, start + step)
            part = None if update is None else update[span]
            finite &= bool(merge_rows(np.ascontiguousarray(rows[span]), out[span], part))
        return finite
    period, row_step, column_step, values = 0, 0, 0, None
    if update is not None:
        period, values = update.shape[1], update.ctypes.data
        row_step, column_step = (step // update.itemsize for step in update.strides)
        if any(step % update.itemsize for step in update.strides):
            return None
    arguments = (rows.ctypes.data, rows.strides[0], source, out.ctypes.data, target, count, width)
    return not kernels.fossil_merge(*arguments, values, period, row_step, column_step)


def measure_rows(before: Array, update: Array, after: Array) -> tuple[float, float, float] | None:
    """<W' - W, ΔW>, |ΔW|² and |W' - W|² of rows W and ΔW in float32 and W' as stored, in float64, added up in the order
    of NumPy's `sum`. All are contiguous."""
    kernels, code = library(), _DTYPES.get(after.dtype.name)
    wide = before.dtype.name == update.dtype.name == "float32" and before.shape == update.shape == after.shape
    if kernels is None or code is None or not wide:
        return None
    if not (before.flags.c_contiguous and update.flags.c_contiguous and after.flags.c_contiguous):
        return None
    sums = (ctypes.c_double * 3)()
    kernels.fossil_measure(before.ctypes.data, update.ctypes.data, after.ctypes.data, code, before.size, sums)
    return sums[0], sums[1], sums[2]
