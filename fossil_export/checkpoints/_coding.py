"""Values that are not stored as they are: rows of floats, computed from other stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

BLOCK = 1 << 19
"""Elements that are decoded at a time: what stays in a processor's cache."""

Decode = Callable[[int, int], "Array"]
"""Rows [start, stop) of an opened range, counted from its first row, in the dtype of the coded tensor."""


class Coding(Protocol):
    """A matrix (rows, width) of floats in other tensors: codes and scales, say. Frozen and comparable."""

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All tensors that it takes, the codes first. No other weight has them."""

    @property
    def width(self) -> int:
        """Columns of the matrix: the coded tensor (…, width) with its leading dimensions taken as one."""

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        """Read what rows [start, stop) need, and return what decodes some of them.

        Stored tensors are read by `rows_of`. Raises CheckpointError for values that no quantizer writes, naming the
        tensor.
        """


class Encoder(Protocol):
    """A coding that can also be written: the same format with other values."""

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        """Its stored tensors, by name, for other values (rows, width) in float32: each in the shape and dtype that it
        has. As the format's library quantizes, if that takes no data (see `Calibrated` if it does). A coding that keeps
        some of them in itself has a method `written`, which gives that of what was encoded."""


class Divisible(Protocol):
    """An encoder whose rows can be written a few at a time. (One that rounds values to 16 bits before it quantizes them
    has that dtype as `rounds_to`, divisible or not.)"""

    @property
    def unit(self) -> int:
        """Rows that are quantized together, and not together with others."""

    def part(self, start: int, stop: int) -> Coding:
        """The coding of rows [start, stop), whole units: of the same tensors what these have."""


class Calibrated(Protocol):
    """A coding that can be written on the scales and zeros that are there, which were calibrated with data."""

    def encoder(self, rows_of: ReadRows) -> Encoder:
        """What encodes on them; they are read by `rows_of`."""


class CodedRows:
    """Rows [start, stop) of the first axis of a coded tensor, or of a slice of one (`slice_of`); of the protocol
    `layouts.Rows`. Stored tensors are read when rows are first asked for, and rows are decoded as they are asked
    for."""

    def __init__(self, info: TensorInfo, rows_of: ReadRows, start: int, stop: int) -> None:
        assert info.coding is not None
        self._coding, self._rows_of = info.coding, rows_of
        self._row = element_count(info.shape[1:])
        self._first = info.first + start * self._row
        self._opened: tuple[int, Decode] | None = None
        self.shape = (stop - start, *info.shape[1:])
        self.dtype = numpy_dtype(info.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Array:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._decoded(start, max(start, stop))
        found: Array = self._decoded(0, len(self))[key]
        return found

    def wide(self, start: int, stop: int) -> Array | None:
        """Rows [start, stop) in float32, with the values that they have in their dtype, in memory that may be written
        to until rows are asked for again; None if the coding has no such way, or the rows are not whole ones of it."""
        width = self._coding.width
        if self._row != width or self._first % width or start >= stop:
            return None
        origin, decode = self._open()
        wide = getattr(decode, "wide", None)
        first = self._first // width - origin
        found: Array | None = None if wide is None else wide(first + start, first + stop)
        return found

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """All rows, a few at a time, each time with the number of the first."""
        step = max(1, BLOCK // max(1, self._row))
        for start in range(0, len(self), step):
            yield start, self[start : start + step]

    def _open(self) -> tuple[int, Decode]:
        if self._opened is None:
            width = self._coding.width
            first, last = self._first // width, -(-(self._first + len(self) * self._row) // width)
            self._opened = first, self._coding.open(self._rows_of, first, last)
        return self._opened

    def _decoded(self, start: int, stop: int) -> Array:
        import numpy as np

        shape = (stop - start, *self.shape[1:])
        if not element_count(shape):
            return np.empty(shape, self.dtype)
        width = self._coding.width
        origin, decode = self._open()
        begin, end = self._first + start * self._row, self._first + stop * self._row
        rows = begin // width, -(-end // width)
        found = decode(rows[0] - origin, rows[1] - origin)
        return found.reshape(-1)[begin % width :][: end - begin].reshape(shape)


def read_rows(info: TensorInfo, start: int, stop: int, rows_of: ReadRows) -> Any:
    """Rows [start, stop) of a tensor, of which `rows_of` reads what is stored; decoded, if it is coded."""
    return rows_of(info, start, stop) if info.coding is None else CodedRows(info, rows_of, start, stop)
