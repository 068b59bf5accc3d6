"""A weights file elsewhere, read where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.storage.fsspec._blocks import AHEAD, BLOCK, Key, blocks

if TYPE_CHECKING:
    import numpy as np


TOGETHER = 2
"""Blocks that one reader holds at a time."""

_NUMBERS = count()


class Place(Protocol):
    """Where the file lies."""

    address: str

    def range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; raises StorageError."""

    def check_state(self, name: str) -> None:
        """Raise StorageError if a file is another one than that which was listed."""


class RemoteFile:
    """The file `name` of `place`, which has `size` bytes; of the protocol `checkpoints._source.Source`.

    That all of it was read of one and the same file is looked at when it is opened and by `check`: the object's tag is
    the same before the first byte and after the last.
    """

    def __init__(self, place: Place, name: str, size: int) -> None:
        self._place, self._name, self._size = place, name, size
        self._blocks, self._id = blocks(), next(_NUMBERS)
        self._count, self._front = -(-size // BLOCK), 0

    def read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8, contiguous) with the bytes from `offset` on; what follows them is read ahead."""
        if not len(out):
            return
        with self._blocks.readers:
            self._read(offset, out)

    def _read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        left, first, last = out.data, offset // BLOCK, (offset + len(out) - 1) // BLOCK
        for number in range(first, last + 1, TOGETHER):
            stop = min(number + TOGETHER, last + 1)
            self._front = max(self._front, stop)
            keys: list[Key] = [(self._id, one) for one in range(number, stop)]
            for key, data in zip(keys, self._blocks.read(keys, self._ahead(stop), self._fetch), strict=True):
                start = offset - key[1] * BLOCK
                taken = min(len(data) - start, len(left))
                left[:taken] = memoryview(data)[start : start + taken]
                left, offset = left[taken:], offset + taken
                self._blocks.spend(key, taken)

    def _ahead(self, stop: int) -> Iterator[Key]:
        """The next blocks, but for those that a reader further on has done with; to be asked for in the lock."""
        for number in range(self._front, min(stop + AHEAD, self._count)):
            yield self._id, number

    def read_rows(self, offset: int, stride: int, out: np.ndarray[Any, Any]) -> None:
        """Fill each row of `out` (rows, n) (uint8, contiguous) with the n bytes that are `stride` bytes further on than
        those of the row before; what is between them is read, too."""
        import numpy as np

        rows_count, width = out.shape
        if not out.size:
            return
        step = max(1, BLOCK // stride)
        span = np.empty((min(step, rows_count) - 1) * stride + width, np.uint8)
        for first in range(0, rows_count, step):
            rows = out[first : first + step]
            if stride >= BLOCK:
                self.read(offset + first * stride, rows[0])
                continue
            self.read(offset + first * stride, span[: (len(rows) - 1) * stride + width])
            rows[:-1] = np.lib.stride_tricks.as_strided(span, (len(rows) - 1, width), (stride, 1))
            rows[-1] = span[(len(rows) - 1) * stride :][:width]

    def check(self) -> None:
        """Raise StorageError where the file was written to or replaced since it was opened."""
        self._place.check_state(self._name)

    def close(self) -> None:
        self._blocks.forget(self._id)

    def _fetch(self, key: Key) -> bytes:
        start = key[1] * BLOCK
        return self._place.range(self._name, start, min(self._size, start + BLOCK))
