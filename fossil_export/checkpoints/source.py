"""A weights file mapped read-only, of which parts are looked at and let go."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np


AHEAD = 64 << 20
"""Bytes past the range at hand that the system is asked to read in meanwhile."""


class MappedFile:
    """Looking at a range costs no copy; `release` keeps the process's memory from growing with the file."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{path}: cannot be read: {problem}") from problem
        self._asked = 0

    def view(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """`nbytes` bytes from `offset` on, as uint8; what follows them is read ahead."""
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
        """Take the pages that lie wholly in the range out of this process's memory; the system may keep them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        # A view may still be referenced by an exception in flight; the map then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()
