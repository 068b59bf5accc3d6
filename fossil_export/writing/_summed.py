"""A large file that has its name once it is whole, and its checksum added up meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.writing._checksum import checksum
from fossil_export.writing._output import OutputFile
from fossil_export.writing._staging import sync_folder

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class SummedFile:
    """A new file that is written under the name `path` and has the name `target` once it is whole and durable; then
    `finished` is called with its checksum (`Output`)."""

    def __init__(self, path: Path, target: Path, size: int, finished: Callable[[int], None]) -> None:
        self._path, self._target, self._finished = path, target, finished
        self._total = 0
        self._adding = threading.Lock()
        try:
            self._file = OutputFile(path, size, claimed=True)
            while not path.exists():  # taken for a dead process's before it was claimed, and removed
                self._file.close(False)
                self._file = OutputFile(path, size, claimed=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._lock = os.dup(self._file.descriptor)

    def is_there(self) -> bool:
        """Whether it is still what its name stands for."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._path.stat(), os.fstat(self._lock))
        return False

    def write(self, offset: int, data: Array) -> None:
        self._file.write(offset, data)
        # What cannot be written to is a map of a file: if that is cut, to read it would end the process.
        total = checksum(data, offset) if data.flags.writeable else _checksum_of_map(data, offset)
        with self._adding:
            self._total += total

    def close(self, done: bool) -> None:
        try:
            self._file.close(done)
            if done:
                self._path.replace(self._target)
                sync_folder(self._target.parent)
                self._finished(self._total % (1 << 64))
        finally:
            if not done:
                with suppress(OSError):  # the next run removes it
                    self._path.unlink(missing_ok=True)
            os.close(self._lock)


class _Span(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


_STEP = 1 << 18
"""Bytes copied at a time: what stays in a processor's cache."""


def _checksum_of_map(data: Array, offset: int) -> int:
    """What a part of a mapped file adds. The system copies it out, since it answers with EFAULT if the file was cut.
    Raises OSError."""
    import numpy as np

    try:
        copy = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError):  # not Linux
        return checksum(data, offset)
    block = np.empty(min(_STEP, len(data)), np.uint8)
    total, done, own, one = 0, 0, os.getpid(), ctypes.c_ulong(1)
    while done < len(data):
        wanted = min(_STEP, len(data) - done)
        here = _Span(block.ctypes.data, wanted)
        there = _Span(data.ctypes.data + done, wanted)
        count = copy(own, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0))
        if count <= 0:
            if (code := ctypes.get_errno()) == errno.EFAULT:
                raise OSError(code, os.strerror(code))
            return total + checksum(data[done:], offset + done)  # it may not be asked (a sandbox)
        total += checksum(block[:count], offset + done)
        done += count
    return total
