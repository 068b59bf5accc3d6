"""Rows of a tensor in which several weights lie one after another, as they are or in another order.

Several weights share a tensor in fused layers (q, k and v, say) and where the experts of a layer are one tensor
(experts, out, in). Other orders of rows come from rotary embeddings: `PermuteForRope` in
transformers/core_model_loading.py. Config and names tell what lies where, so whoever places a weight makes these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.layouts._matrix import InOneTensor, ReadRows, Rows, Stored
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Order:
    """Stored rows are `groups` tables (`outer`, `inner`), which the matrix has as (`inner`, `outer`).

    As torch has it: matrix = stored.view(groups, outer, inner, width).transpose(1, 2).reshape(rows, width). What
    transformers' PermuteForRope does to a model it loads is Order(heads, head size // 2, 2).
    """

    groups: int
    outer: int
    inner: int

    @property
    def rows(self) -> int:
        return self.groups * self.group

    @property
    def group(self) -> int:
        """Rows that stay among themselves."""
        return self.outer * self.inner

    @property
    def inverse(self) -> Order:
        return Order(self.groups, self.inner, self.outer)

    def matrix(self, stored: Array) -> Array:
        """Whole groups of rows (n, …) as they are stored, in the order of the matrix."""
        return _swapped(stored, self.outer, self.inner)

    def stored(self, matrix: Array) -> Array:
        """Whole groups of rows (n, …) of the matrix, in the order in which they are stored."""
        return _swapped(matrix, self.inner, self.outer)


def _swapped(rows: Array, outer: int, inner: int) -> Array:
    return rows.reshape(-1, outer, inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class FusedRows(InOneTensor):
    """Rows [first, first + count) of a tensor (…, in) whose other dimensions are taken as one.

    With an `order` they are the rows of the matrix in that order. `fused_rows` makes it, with checks.
    """

    first: int
    count: int
    order: Order | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.info.shape[-1]

    @property
    def span(self) -> tuple[int, int]:
        width = self.info.shape[-1]
        return self.first * width, (self.first + self.count) * width

    def unit(self, rows: int) -> int:
        return rows if self.order is None else math.lcm(rows, self.order.group)

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        found = rows_of(flattened(self.info), self.first + start, self.first + stop)
        return found if self.order is None else self.order.matrix(found[:])

    def write(self, rows: Array, start: int) -> Iterator[Stored]:
        yield Stored((self.first + start) * self.shape[1], rows if self.order is None else self.order.stored(rows))


def flattened(info: TensorInfo) -> TensorInfo:
    """The tensor (…, in) with its other dimensions taken as one."""
    width = info.shape[-1]
    return slice_of(info, 0, element_count(info.shape), (element_count(info.shape[:-1]), width))


def fused_rows(info: TensorInfo, first: int, count: int, order: Order | None = None) -> FusedRows:
    """Where a weight (count, in) lies that is rows [first, first + count) of `info` (…, in), in this `order`.

    Expert e of a tensor (experts, out, in) is fused_rows(info, e * out, out). Raises CheckpointError if there are no
    such rows.
    """
    where = f"{info.path}: {info.name} {list(info.shape)}"
    rows = element_count(info.shape[:-1])
    if len(info.shape) < 2 or not 0 <= first < first + count <= rows:
        raise CheckpointError(f"{where} has no rows {first} to {first + count - 1}; its config.json describes another")
    if order is not None and (order.rows != count or min(order.outer, order.inner) < 1):
        raise CheckpointError(
            f"{where}: its {count} rows are not {order.groups} times {order.outer} times {order.inner}; its "
            "config.json describes another"
        )
    return FusedRows(info, first, count, order)
