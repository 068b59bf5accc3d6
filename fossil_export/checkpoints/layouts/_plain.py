"""A tensor (out, in), row by row: what torch.nn.Linear saves.

A bias (out) is a matrix (out, 1), and the weight of a convolution (out, in, *kernel) one (out, in · kernel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._matrix import InOneTensor, ReadRows, Rows, Stored

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Plain(InOneTensor):
    @property
    def shape(self) -> tuple[int, int]:
        return self.info.shape[0], element_count(self.info.shape[1:])

    def unit(self, rows: int) -> int:
        return rows

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        return rows_of(self.info if len(self.info.shape) == 2 else replace(self.info, shape=self.shape), start, stop)

    def write(self, rows: Array, start: int) -> Iterator[Stored]:
        yield Stored(start * self.shape[1], rows)


def plain(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Plain | None:
    """Any tensor of that name."""
    info = tensors.get(name)
    return Plain(info) if info is not None and info.shape else None
