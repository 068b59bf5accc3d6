"""Where infinities and NaN come from, in a line for the user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.merging._layout import TensorPlan

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LOOKED_AT = 1 << 16
# Elements that are widened to see which are infinite.


def became_infinite(data: Array, out: Array) -> bool:
    """Whether an element of `out` is infinite or NaN that is finite in `data`. A base may hold infinities of its own
    (masks), which are looked at a few at a time."""
    import numpy as np

    before, after = data.reshape(-1), out.reshape(-1)
    for start in range(0, len(after), _LOOKED_AT):
        span = slice(start, start + _LOOKED_AT)
        lost = ~np.isfinite(after[span].astype(np.float64))
        if np.isfinite(before[span][lost].astype(np.float64)).any():
            return True
    return False


def diverged(info: TensorInfo) -> str:
    return f"{info.path}: {info.name} holds infinite or NaN values; training diverged, take an earlier adapter"


def damaged(info: TensorInfo) -> str:
    return f"{info.path}: {info.name} holds infinite or NaN values; the base is damaged, fetch it again"


def overflow(tensor: TensorPlan) -> str:
    if tensor.dtype in ("F16", "BF16"):
        remedy = f"choose --dtype {'bfloat16 or float32' if tensor.dtype == 'F16' else 'float32'}"
    elif any(change.weight != 1.0 for change in tensor.changes):
        remedy = "give the adapters smaller weights"
    elif tensor.dtype != tensor.source.dtype:
        remedy = "leave out --dtype"
    else:
        remedy = "training diverged, take an earlier adapter"
    return f"{tensor.name}: overflows {numpy_dtype(tensor.dtype).name}; {remedy}"
