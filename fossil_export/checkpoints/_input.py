"""A weights file that is read piece by piece, and held against the header that was planned with.

Parts that are computed on are read into buffers, so that a file which is cut meanwhile gives a short read, not a
signal. Parts that are copied are looked at through a map: the system takes them from there without a copy.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._stamp import Stamp, changed, check_stamp
from fossil_export.errors import CheckpointError, unreadable

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints._source import Source


AHEAD = 64 << 20
"""Bytes past the range at hand that the system is asked to read in meanwhile."""

SPAN = 1 << 20
"""Bytes that are read at once to take some of each row of them."""

CHEAP = 8 << 10
"""Bytes that are read sooner than passed over."""


class InputFile:
    """The file at `path`, which must have the bytes of `header` before its tensors.

    With `steady` it must also be the very file whose header was read, unchanged; another file may stand in for it
    otherwise (a copy that was fetched, or that is being merged in place). Raises CheckpointError.
    """

    def __init__(self, path: Path, header: Header, steady: bool = True) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise CheckpointError(unreadable(path, problem)) from problem
        try:
            status = os.fstat(self._descriptor)
            self._stamp = Stamp.of(status) if steady else None
            moved = steady and header.stamp is not None and header.stamp != self._stamp
            beginning = os.pread(self._descriptor, len(header.encoded), 0)
            if moved or status.st_size != header.size or beginning != header.encoded:
                raise changed(path)
            self._map = mmap.mmap(self._descriptor, header.size, access=mmap.ACCESS_READ)
        except OSError as problem:
            os.close(self._descriptor)
            raise CheckpointError(unreadable(path, problem)) from problem
        except ValueError as problem:  # of the map
            os.close(self._descriptor)
            raise CheckpointError(f"{path}: cannot be read: {problem}; fetch it again") from problem
        except BaseException:
            os.close(self._descriptor)
            raise
        self._asked = 0

    def read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8, contiguous) with the bytes from `offset` on; what follows them is read ahead."""
        self._read_ahead(min(offset + len(out) + AHEAD, len(self._map)), offset)
        left = out.data
        while left:
            count = self._read_into(left, offset)
            if not count:
                raise changed(self.path)
            left, offset = left[count:], offset + count

    def read_rows(self, offset: int, stride: int, out: np.ndarray[Any, Any]) -> None:
        """Fill each row of `out` (rows, n) (uint8, contiguous) with the n bytes that are `stride` bytes further on than
        those of the row before; the first ones are at `offset`."""
        count, width = out.shape
        if not out.size:
            return
        # A system call takes as long as the copy of some 8 KB.
        if stride <= CHEAP or 4 * width >= stride:
            self._read_spans(offset, stride, out)
            return
        left = out.reshape(-1).data
        for number in range(count):
            if number % 256 == 0:
                self._read_ahead(min(offset + AHEAD, len(self._map)), offset)
            row = left[number * width : (number + 1) * width]
            if self._read_into(row, offset) != width:
                self.read(offset, out[number])
            offset += stride

    def _read_into(self, out: memoryview, offset: int) -> int:
        try:
            return _read_into(self._descriptor, out, offset)
        except OSError as problem:
            raise CheckpointError(unreadable(self.path, problem)) from problem

    def _read_spans(self, offset: int, stride: int, out: np.ndarray[Any, Any]) -> None:
        """The same with all that is between the rows."""
        import numpy as np

        count, width = out.shape
        step = max(1, SPAN // stride)
        span = np.empty(min(step, count) * stride, np.uint8)
        for first in range(0, count, step):
            rows = out[first : first + step]
            # Past the last row there may be nothing.
            self.read(offset + first * stride, span[: (len(rows) - 1) * stride + width])
            rows[:-1] = span[: (len(rows) - 1) * stride].reshape(-1, stride)[:, :width]
            rows[-1] = span[(len(rows) - 1) * stride :][:width]

    def view(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """`nbytes` bytes from `offset` on, as uint8, not copied; only for handing to the system."""
        import numpy as np

        self._read_ahead(min(offset + nbytes + AHEAD, len(self._map)), offset)
        return np.frombuffer(self._map, np.uint8, nbytes, offset)

    def _read_ahead(self, end: int, offset: int) -> None:
        # Page faults alone would wait for the disk a few pages at a time.
        if hasattr(mmap, "MADV_WILLNEED") and end - self._asked >= min(AHEAD // 4, len(self._map) - self._asked) > 0:
            start = max(self._asked, offset) // mmap.PAGESIZE * mmap.PAGESIZE
            self._asked = end
            if start < end:
                self._map.madvise(mmap.MADV_WILLNEED, start, end - start)

    def release(self, offset: int, nbytes: int) -> None:
        """Take the pages that lie wholly in a range that was viewed out of this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def check(self) -> None:
        """Raise CheckpointError where the file was written to or replaced since it was opened."""
        if self._stamp is not None and Stamp.of(os.fstat(self._descriptor)) != self._stamp:
            raise changed(self.path)
        check_stamp(self.path, self._stamp)

    def close(self) -> None:
        os.close(self._descriptor)
        # A view may still be referenced by an exception in flight; the map then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


class Window:
    """Some bytes of a file, read at once, from which small arrays are taken; others come from the file."""

    def __init__(self, file: Source, start: int, nbytes: int) -> None:
        self._file, self._start = file, start
        self._bytes = _fresh(nbytes)
        file.read(start, self._bytes)

    def read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        """As `InputFile.read`."""
        at = offset - self._start
        if at < 0 or at + len(out) > len(self._bytes):
            self._file.read(offset, out)
        else:
            out[:] = self._bytes[at : at + len(out)]

    def read_rows(self, offset: int, stride: int, out: np.ndarray[Any, Any]) -> None:
        """As `InputFile.read_rows`."""
        self._file.read_rows(offset, stride, out)


class StoredArray:
    """A tensor in a file as an array of which just what is sliced is read, into `buffer(nbytes)`: rows of the first
    axis, or (of a matrix) columns next to each other; for other indices all of it."""

    def __init__(
        self,
        file: Source | Window,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        buffer: Callable[[int], np.ndarray[Any, Any]] | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._file, self._offset = file, offset
        self._buffer = buffer or _fresh
        self._row = dtype.itemsize * element_count(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray[Any, Any]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._rows(start, max(start, stop))
        elif isinstance(key[1], slice) and key[0] == slice(None) and len(self.shape) == 2:
            start, stop, step = key[1].indices(self.shape[1])
            if step == 1:
                return self._columns(start, max(start, stop))
        found: np.ndarray[Any, Any] = self._rows(0, len(self))[key]
        return found

    def _rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        raw = self._buffer((stop - start) * self._row)
        self._file.read(self._offset + start * self._row, raw)
        return raw.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def _columns(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        size = self.dtype.itemsize
        raw = self._buffer(len(self) * (stop - start) * size).reshape(len(self), -1)
        self._file.read_rows(self._offset + start * size, self._row, raw)
        return raw.view(self.dtype)


class Reused:
    """Memory for one `StoredArray` of which one slice is needed at a time: asking the system for it anew, page by page,
    costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._whole: np.ndarray[Any, Any] | None = None

    def __call__(self, nbytes: int) -> np.ndarray[Any, Any]:
        if self._whole is None or len(self._whole) < nbytes:
            self._whole = _fresh(nbytes)
        return self._whole[:nbytes]


def _fresh(nbytes: int) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.empty(nbytes, np.uint8)


def _read_into(descriptor: int, out: memoryview, offset: int) -> int:
    """Read what there is, up to the length of `out`; returns the bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    found = os.pread(descriptor, len(out), offset)
    out[: len(found)] = found
    return len(found)
