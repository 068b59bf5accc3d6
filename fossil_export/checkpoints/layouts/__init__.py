"""How weights lie in files: one file per layout, one entry in `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._matrix import InOneTensor, Layout, Matrix, ReadRows, Rows, Stored
from fossil_export.checkpoints.layouts._plain import plain
from fossil_export.checkpoints.layouts._rows import Order, fused_rows
from fossil_export.checkpoints.layouts._transposed import Transposed, is_conv1d, transposed, transposed_slice

LAYOUTS: dict[str, Layout] = {"transposed": transposed, "plain": plain}
"""Asked in this order: the first that knows a weight has it. Rows of fused tensors (`fused_rows`) and slices
(`transposed_slice`) have no name of their own; whoever places a weight makes them."""


def find_matrix(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> Matrix | None:
    """Where the weight `name` of a checkpoint lies, None if no layout knows it."""
    found = (layout(name, tensors, config or {}) for layout in LAYOUTS.values())
    return next((matrix for matrix in found if matrix is not None), None)


__all__ = [
    "LAYOUTS",
    "InOneTensor",
    "Layout",
    "Matrix",
    "Order",
    "ReadRows",
    "Rows",
    "Stored",
    "Transposed",
    "find_matrix",
    "fused_rows",
    "is_conv1d",
    "transposed_slice",
]
