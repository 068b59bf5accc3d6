"""The files that a check reads, and the memory that it reads them into."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import numpy_dtype, stored_dtype
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._input import Reused, StoredArray
from fossil_export.checkpoints._source import Source, open_source
from fossil_export.checkpoints.layouts import ReadRows
from fossil_export.verifying._compiled import Factor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KEPT = 4
"""Factors of products that are kept: neighbouring pieces have the same ones."""


FEW = 4
"""Threads that compute with NumPy in float64 at a time."""


class _Space:
    """A buffer that is asked for by one name."""

    def __init__(self) -> None:
        self._reused = Reused()

    def __call__(self, name: str, nbytes: int) -> Array:
        return self._reused(nbytes)


class Files:
    """Open files by path, each held against the header that was read of it."""

    def __init__(self, files: Mapping[Path, tuple[Folder, Header]]) -> None:
        self._files = files
        self._open: dict[Path, Source] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._making = threading.Lock()
        self._factors: dict[Any, Factor] = {}
        self._few = threading.Semaphore(FEW)
        self._spaces: list[_Space] = []

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in self._open.values():
            file.close()

    def _file(self, info: TensorInfo) -> Source:
        with self._lock:
            if info.path not in self._open:
                self._open[info.path] = open_source(*self._files[info.path])
            return self._open[info.path]

    def buffer(self, name: str, nbytes: int) -> Array:
        """Bytes of this thread, which have what they had when it last asked for this name."""
        import numpy as np

        found = getattr(self._local, name, None)
        if found is None or len(found) < nbytes:
            found = np.empty(nbytes, np.uint8)
            setattr(self._local, name, found)
        return found[:nbytes]

    def factor(self, key: Any, make: Callable[[], Factor]) -> Factor:
        """What was last made for this key, or is made."""
        with self._making:  # once, not by each of the threads that want it
            found = self._factors.get(key)
            if found is None:
                found = self._factors[key] = make()
                while len(self._factors) > KEPT:
                    del self._factors[next(iter(self._factors))]
        return found

    @contextmanager
    def space(self) -> Iterator[Callable[[str, int], Array]]:
        """Buffers for float64, which few threads have at a time: NumPy would hardly be faster in more."""
        with self._few:
            with self._lock:
                found = self._spaces.pop() if self._spaces else _Space()
            try:
                yield found
            finally:
                with self._lock:
                    self._spaces.append(found)

    def read(self, info: TensorInfo, start: int, nbytes: int, name: str) -> Array:
        """`nbytes` bytes of a tensor, from its byte `start` on, as uint8, in the buffer of that `name`."""
        assert info.offset is not None
        found = self.buffer(name, nbytes)
        self._file(info).read(info.offset + start, found)
        return found

    def columns(self, info: TensorInfo, first: int, shape: tuple[int, int], width: int, name: str) -> Array:
        """Some columns of some rows of `width` elements, from element `first` on, in the buffer of that `name`."""
        assert info.offset is not None
        kind = numpy_dtype(info.dtype)
        raw = self.buffer(name, shape[0] * shape[1] * kind.itemsize)
        offset = info.offset + first * kind.itemsize
        if shape[1] == width:
            self._file(info).read(offset, raw)
        else:
            self._file(info).read_rows(offset, width * kind.itemsize, raw.reshape(shape[0], -1))
        return raw.view(kind).reshape(shape)

    def array(self, info: TensorInfo, adapter: Adapter) -> Array | StoredArray:
        """A tensor, of which what is sliced is read."""
        if info.offset is None:
            return adapter.array(info)
        return StoredArray(self._file(info), info.offset, info.shape, numpy_dtype(info.dtype))

    def rows(self, adapter: Adapter) -> ReadRows:
        """Rows of stored tensors, of which the adapter may be the owner."""

        def read(info: TensorInfo, start: int, stop: int) -> Any:
            if info.coding is not None:
                return CodedRows(info, self.codes, start, stop)
            return self.array(info, adapter)[start:stop]

        return read

    def codes(self, info: TensorInfo, start: int, stop: int) -> Any:
        """Rows of what values are decoded from."""
        assert info.offset is not None
        whole = StoredArray(self._file(info), info.offset, info.shape, stored_dtype(info.dtype))
        return whole if (start, stop) == (0, len(whole)) else whole[start:stop]  # of all of it, columns may be wanted

    def check(self) -> None:
        for file in self._open.values():
            file.check()
