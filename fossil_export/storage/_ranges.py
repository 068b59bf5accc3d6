"""A file elsewhere, read like one here."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class Ranges(io.RawIOBase):
    """A file of `size` bytes, of which what is read comes as a range: `read(start, stop)` gives those bytes."""

    def __init__(self, read: Callable[[int, int], Any], size: int) -> None:
        self._read, self._size = read, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        found = memoryview(self._read(self._at, stop) if stop > self._at else b"")
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
