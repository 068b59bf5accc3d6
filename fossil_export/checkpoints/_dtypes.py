"""The dtypes of the safetensors format and what they are in NumPy.

Source: `Dtype` in safetensors/src/tensor.rs (names and widths). bfloat16 comes from `ml_dtypes`, whose
casts round to nearest, ties to even, as PyTorch's do.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width in bits of one element of each dtype a safetensors header may name."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes a shard can be merged into."""

WHOLE = ("I64", "I32", "I16", "I8", "U8")
"""The dtypes of whole numbers that say where trained values go."""

BY_TORCH_NAME = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAME = {short: name for name, short in BY_TORCH_NAME.items()}
INTEGERS = {"int64": "I64", "int32": "I32"}
"""By PyTorch's names, of tensors that count rows or columns."""


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype for one of `FLOATS` or `WHOLE`."""
    import ml_dtypes
    import numpy as np

    table: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    table |= {name: f"{name[0].lower()}{int(name[1:]) // 8}" for name in WHOLE}
    found: np.dtype[Any] = np.dtype(table[name])
    return found


def stored_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype for any dtype of the format that has whole bytes."""
    import ml_dtypes
    import numpy as np

    narrow: dict[str, Any] = {
        "BOOL": np.bool_,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": "i2",
        "U16": "u2",
        "U32": "u4",
        "U64": "u8",
    }
    return np.dtype(narrow[name]) if name in narrow else numpy_dtype(name)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype that has whole ones."""
    return BITS[dtype] // 8


def element_count(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of `shape`; 1 for a scalar."""
    count = 1
    for size in shape:
        count *= size
    return count


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes a tensor takes in a file; a count that is no whole number of bytes is rounded up."""
    return (element_count(shape) * BITS[dtype] + 7) // 8
