"""A large file that is written in any order and sent in its own: in bounded memory, the rest on the disk.

Slabs come nearly in order, and the parts that they fill leave at once. Those far ahead of a part that is not full yet
(a quantized weight is written all over the file) wait in a temporary file, so that no write ever waits for another one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.errors import OutputError, reason
from fossil_export.storage.fsspec._errors import explained
from fossil_export.writing._scratch import Scratch
from fossil_export.writing.remote._uploads import Upload, part_size

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MEMORY = 48 << 20
"""Bytes of parts in memory, or two parts, if these are more."""

PATIENCE = 1.0
"""Seconds that a write waits for a part that is being filled by others, before it goes to the disk."""


@dataclass
class _Part:
    size: int
    filled: int = 0
    buffer: bytearray | None = None
    on_disk: bool = False


class Window:
    """A file of `size` bytes on its way (`Output`); `begin` gives its upload by the number of its parts; `finished` is
    called when it is there. With `hash` its SHA-256 is known then. Threads that write wait while too much is on its
    way. Raises a FossilExportError with `name`."""

    def __init__(
        self,
        name: str,
        size: int,
        begin: Callable[[int], Upload],
        hash: bool = False,  # noqa: A002
        finished: Callable[[Window], None] = lambda window: None,
    ) -> None:
        self._name, self._size, self._unit = name, size, part_size(size)
        self._count = max(1, -(-size // self._unit))
        self._room = max(2, MEMORY // self._unit)
        self._free: list[bytearray] = []
        self._parts: dict[int, _Part] = {}
        self._next = self._flying = 0
        self._is_spilling = False
        self._problem: BaseException | None = None
        self._changed = threading.Condition()
        self._hash = hashlib.sha256() if hash else None
        self._spill: _Spill | None = None
        self._finished = finished
        with told(name):
            self._upload = begin(self._count)
        self._line = ThreadPoolExecutor(1)  # parts in their order, read from the disk and hashed
        self._lanes = ThreadPoolExecutor(self._upload.lanes)
        self.sha256: str | None = None

    def write(self, offset: int, data: Array) -> None:
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, self._unit)
            piece = data[done : done + self._unit - start]
            self._put(number, start, piece)
            done += len(piece)

    def close(self, done: bool) -> None:
        is_whole = False
        try:
            if done:
                with self._changed:
                    while self._problem is None and (self._flying or self._ready()):
                        self._changed.wait()
                    self._refuse()
                    assert self._next == self._count, "a write is missing"
                with told(self._name):
                    self._upload.finish()
                is_whole = True
                self.sha256 = None if self._hash is None else self._hash.hexdigest()
                self._finished(self)
        finally:
            with self._changed:
                self._problem = self._problem or RuntimeError("the file is closed")
            # What is on its way arrives, or the store may keep it.
            self._line.shutdown()
            self._lanes.shutdown()
            if not is_whole:
                self._upload.abort()
            if self._spill is not None:
                self._spill.close()
            self._parts.clear()
            self._free.clear()

    def _put(self, number: int, start: int, piece: Array) -> None:
        import numpy as np

        with self._changed:
            part = self._place(number)
        if part.on_disk:
            assert self._spill is not None
            self._spill.write(number * self._unit + start, piece)
        else:
            assert part.buffer is not None
            np.copyto(np.frombuffer(part.buffer, np.uint8)[start : start + len(piece)], piece)
        with self._changed:
            part.filled += len(piece)
            if part.filled == part.size:
                self._send()
                self._changed.notify_all()

    def _place(self, number: int) -> _Part:
        """The part, with a place for its bytes."""
        part = self._parts.get(number)
        if part is None:
            size = min(self._unit, self._size - number * self._unit)
            part = self._parts[number] = _Part(size)
        while True:
            self._refuse()
            if part.buffer is not None or part.on_disk:
                return part
            part.buffer = self._buffer()
            if part.buffer is not None:
                return part
            # What is on its way makes room; parts that wait for others may wait for this one.
            is_moving = bool(self._flying) or self._ready()
            if not is_moving and (self._is_spilling or not self._changed.wait(PATIENCE)) and part.buffer is None:
                self._spill = self._spill or _Spill()
                self._is_spilling = part.on_disk = True
            elif is_moving:
                self._changed.wait()

    def _buffer(self, spare: int = 1) -> bytearray | None:
        """One that nobody has; `spare` are kept for parts that come from the disk."""
        if len(self._free) + self._room <= spare:
            return None
        if self._free:
            return self._free.pop()
        self._room -= 1
        return bytearray(self._unit)

    def _ready(self) -> bool:
        part = self._parts.get(self._next)
        return part is not None and part.filled == part.size

    def _send(self) -> None:
        """All parts that are next and full go on their way."""
        while self._ready():
            part = self._parts[self._next]
            if part.buffer is None:
                part.buffer = self._buffer(spare=0)
                if part.buffer is None:
                    return  # one that is on its way brings it
            number = self._next
            del self._parts[number]
            self._next += 1
            self._flying += 1
            self._line.submit(self._prepare, number, part)

    def _prepare(self, number: int, part: _Part) -> None:
        assert part.buffer is not None
        try:
            with self._changed:
                self._refuse()
            data = memoryview(part.buffer)[: part.size]
            if part.on_disk:
                assert self._spill is not None
                self._spill.read(number * self._unit, data)
            if self._hash is not None:
                self._hash.update(data)
            self._lanes.submit(self._fly, number, part)
        except BaseException as problem:
            self._landed(part, problem)

    def _fly(self, number: int, part: _Part) -> None:
        assert part.buffer is not None
        problem: BaseException | None = None
        try:
            with self._changed:
                self._refuse()
            with told(self._name):
                self._upload.part(number, memoryview(part.buffer)[: part.size])
        except BaseException as raised:
            problem = raised
        self._landed(part, problem)

    def _landed(self, part: _Part, problem: BaseException | None) -> None:
        with self._changed:
            self._problem = self._problem or problem
            self._flying -= 1
            assert part.buffer is not None
            self._free.append(part.buffer)
            part.buffer = None
            if self._problem is None:
                self._send()
            self._changed.notify_all()

    def _refuse(self) -> None:
        if self._problem is not None:
            raise self._problem


@contextmanager
def told(name: str) -> Iterator[None]:
    """What a file system refuses in the block is told in a line."""
    try:
        yield
    except Exception as problem:
        raise explained(problem, name, "cannot be written") from problem


class _Spill:
    """A temporary file, written and read at any offset; it takes the room of what was written."""

    def __init__(self) -> None:
        try:
            self._folder = Scratch()
            self._path = self._folder.path / "parts"
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise _no_room(Path(tempfile.gettempdir()), problem) from problem

    def write(self, offset: int, data: Array) -> None:
        view = data.data
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as problem:
            raise _no_room(self._path, problem) from problem

    def read(self, offset: int, into: memoryview) -> None:
        try:
            while into:
                count = os.preadv(self._file, [into], offset)
                if not count:
                    raise OSError("it was cut off by another program")
                into, offset = into[count:], offset + count
        except OSError as problem:
            raise _no_room(self._path, problem) from problem

    def close(self) -> None:
        os.close(self._file)
        self._folder.close()


def _no_room(path: Path, problem: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot hold what waits to be sent: {reason(problem)}; make room, or set TMPDIR to another disk"
    )
