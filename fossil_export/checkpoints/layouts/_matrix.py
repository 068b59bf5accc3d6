"""What a layout is: how a float matrix (out, in) lies in stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    Array = np.ndarray[Any, Any]


class Rows(Protocol):
    """Rows of a tensor as an array of which only what is sliced is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...


ReadRows = Callable[[TensorInfo, int, int], Rows]
"""Rows [start, stop) of a stored tensor's first axis."""


@dataclass(frozen=True)
class Stored:
    """`values` belong at element `offset` of the tensor that holds the matrix (`Matrix.stored[0]`)."""

    offset: int
    values: Any


class Matrix(Protocol):
    """A matrix (out, in) of floats, read and written by slabs of its rows.

    `stored` are the tensors that hold it: the first has its values, and the others (scales, say) what these need.
    Nothing can be merged into it unless the first is of floats.
    """

    @property
    def stored(self) -> tuple[TensorInfo, ...]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> str:
        """Of the rows that are read, one of `FLOATS`; another one for values that cannot be merged into."""

    @property
    def span(self) -> tuple[int, int]:
        """The elements [first, last) of `stored[0]` that it has to itself; other matrices, or values of no matrix, may
        lie before and after them."""

    def unit(self, rows: int) -> int:
        """How many rows go together, for a method that wants `rows` of them at once: a multiple of that, or all."""

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        """Rows [start, stop) as an array (n, in) of a float dtype; `start` is a multiple of the unit."""

    def write(self, rows: Array, start: int) -> Iterator[Stored]:
        """What to store where for `rows` (n, in), which begin at row `start`, in the dtype they are stored in.

        A layout that stores rows as they are gives the very array it was given.
        """

    def moved(self, info: TensorInfo) -> Matrix:
        """The same layout in another file's tensor."""


@dataclass(frozen=True)
class InOneTensor:
    """What layouts share whose matrix lies in one tensor, `info`, and has it to itself."""

    info: TensorInfo

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def span(self) -> tuple[int, int]:
        return 0, element_count(self.info.shape)

    def moved(self, info: TensorInfo) -> Self:
        return replace(self, info=info)


Layout = Callable[[str, Mapping[str, TensorInfo], Mapping[str, Any]], Matrix | None]
"""From a weight's name, a checkpoint's tensors by name and its config to where the weight lies; None if it does not lie
so."""
