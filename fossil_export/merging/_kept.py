"""Trained tensors that threads use at the same time, in memory once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fossil_export.checkpoints._input import StoredArray

SMALL = 4 << 20
"""Bytes up to which a trained tensor is read whole; reading it by rows would cost more calls."""

ROOM = 16 << 20
"""Bytes of those that stay: what the weights need that are being merged."""


class Kept:
    """The arrays used last, up to `ROOM` bytes of them; each is made once, however many threads want it. They are not
    to be written to."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[Hashable, Any] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._size = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._arrays:
                    self._arrays.move_to_end(key)
                    return self._arrays[key]
            array = make()
            if hasattr(array, "flags"):  # a tensor of PyTorch has none
                array.flags.writeable = False
            with self._lock:
                self._arrays[key] = array
                self._size += array.nbytes
                while self._size > ROOM and len(self._arrays) > 1:
                    old, gone = self._arrays.popitem(last=False)
                    self._size -= gone.nbytes
                    self._making.pop(old, None)
        return array


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
