"""Writing a large file of known size at full speed, from several threads.

Past the page cache (O_DIRECT) where the filesystem allows: nothing is left to sync, and the user's own
files stay cached. Measured against the other ways in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT = 4096
"""Bytes; what O_DIRECT asks of file offset, memory address and length on every common device."""

_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class OutputFile:
    """A new file of `size` bytes, written at any offset by any thread, durable once `close` returns.

    With `existing` it is a file that has them already, of which parts are written anew. With `claimed` it is locked as
    long as it is open, or a duplicate of its `descriptor` is, so that it can be told from what a dead process left.

    The room is taken at once, so a full disk shows before the work, as OSError. Partial pages at the ends
    of a write go through the page cache, whole ones past it; no page is ever written both ways.
    """

    def __init__(
        self, path: Path, size: int, direct: bool = True, existing: bool = False, claimed: bool = False
    ) -> None:
        self._direct: int | None = None
        self._refused: int | None = None
        self._buffered = os.open(path, os.O_WRONLY if existing else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.descriptor = self._buffered
        try:
            if claimed:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._buffered, fcntl.LOCK_EX)
            if not existing:
                _allocate(self._buffered, size)
            if direct and hasattr(os, "O_DIRECT"):
                self._direct = _open_direct(path)
        except BaseException:
            os.close(self._buffered)
            raise

    def write(self, offset: int, data: np.ndarray[Any, Any]) -> None:
        """Write `data` (uint8, contiguous) at `offset`; fastest when its address equals `offset` modulo ALIGNMENT."""
        end = offset + len(data)
        first, last = -(-offset // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        aligned = (data.ctypes.data - offset) % ALIGNMENT == 0
        direct = self._direct
        if direct is None or not aligned or first >= last:
            _write_all(self._buffered, data, offset)
            return
        try:
            _write_all(direct, data[first - offset : last - offset], first)
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
            # Some filesystems take the flag and refuse the write. The descriptor stays open for other threads.
            self._refused, self._direct = direct, None
            _write_all(self._buffered, data[first - offset : last - offset], first)
        _write_all(self._buffered, data[: first - offset], offset)
        _write_all(self._buffered, data[last - offset :], last)

    def close(self, done: bool) -> None:
        """Flush to the device (unless the file is about to be thrown away) and close."""
        try:
            if done:
                os.fsync(self._buffered)
        finally:
            for descriptor in (self._direct, self._refused, self._buffered):
                if descriptor is not None:
                    os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(descriptor, size)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as problem:
        if problem.errno in _UNSUPPORTED:
            return None
        raise


def _write_all(descriptor: int, data: np.ndarray[Any, Any], offset: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
