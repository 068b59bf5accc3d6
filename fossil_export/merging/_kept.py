"""Trained tensors that threads use at the same time, in memory once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fossil_export.checkpoints._input import StoredArray

SMALL = 4 << 20
"""Bytes up to which a trained tensor is read whole; reading it by rows would cost more calls."""

ROOM = 16 << 20
"""Bytes of those that stay: what the weights need that are being merged."""


class Kept:
    """The arrays used last; each is made once, however many threads want it. They are not to be written to.

    Those that slabs have in hand and those that stay take up to `room` bytes (by default `ROOM`) together. A slab that
    wants one more waits, unless it is the oldest at work: so one that needs more than the room has it alone.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = ROOM if room is None else room
        self._arrays: OrderedDict[Hashable, Any] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._making: set[Hashable] = set()
        self._users: dict[Hashable, int] = {}
        self._changed = threading.Condition()
        self._turns: dict[int, set[Hashable]] = {}
        self._waiting: set[int] = set()
        self._next = 0
        self._local = threading.local()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The time of a slab, in which what it got stays its own."""
        with self._changed:
            number = self._next
            self._next += 1
            self._turns[number] = set()
        self._local.number = number
        try:
            yield
        finally:
            self._local.number = None
            with self._changed:
                for key in self._turns.pop(number):
                    self._users[key] -= 1
                self._trim(0)
                self._changed.notify_all()

    def get(self, key: Hashable, make: Callable[[], Any], nbytes: int = 0) -> Any:
        """The array of that key, which takes about `nbytes`."""
        number = getattr(self._local, "number", None)
        with self._changed:
            while True:
                if key in self._arrays:
                    self._arrays.move_to_end(key)
                    self._use(key, number)
                    return self._arrays[key]
                if key not in self._making and self._may_have(nbytes, number):
                    break
                self._waiting.add(-1 if number is None else number)
                self._changed.wait()
                self._waiting.discard(-1 if number is None else number)
            self._making.add(key)
            self._sizes[key] = nbytes
        try:
            array = make()
            if hasattr(array, "flags"):  # a tensor of PyTorch has none
                array.flags.writeable = False
        except BaseException:
            with self._changed:
                self._making.discard(key)
                del self._sizes[key]
                self._changed.notify_all()
            raise
        with self._changed:
            self._making.discard(key)
            self._arrays[key] = array
            self._sizes[key] = array.nbytes
            self._use(key, number)
            self._trim(0)
            self._changed.notify_all()
        return array

    def _use(self, key: Hashable, number: int | None) -> None:
        if number is not None and key not in self._turns[number]:
            self._turns[number].add(key)
            self._users[key] = self._users.get(key, 0) + 1

    def _may_have(self, nbytes: int, number: int | None) -> bool:
        self._trim(nbytes)
        if number is None or number == min(self._turns):
            return True
        if any(other < number for other in self._waiting):
            return False
        return sum(self._sizes.values()) + nbytes <= self._room

    def _trim(self, nbytes: int) -> None:
        """Let go what nobody has in hand, until so many bytes have room."""
        size = sum(self._sizes.values()) + nbytes
        last = next(reversed(self._arrays), None)
        for key in list(self._arrays):
            if size <= self._room:
                return
            if not self._users.get(key) and (nbytes or key != last):
                size -= self._sizes.pop(key)
                self._users.pop(key, None)
                del self._arrays[key]


class Large:
    """A stored tensor of which a part is read when it is sliced; all of it (`[:]`) is what `whole` gives."""

    def __init__(self, stored: StoredArray, whole: Callable[[], Any]) -> None:
        self.shape, self.dtype = stored.shape, stored.dtype
        self._stored, self._whole = stored, whole

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.indices(len(self)) == (0, len(self), 1):
            return self._whole()
        return self._stored[key]
