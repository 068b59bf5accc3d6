"""Memory of each thread that is used again."""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TYPE_CHECKING, Any

from fossil_export.merging._slabs import SLAB
from fossil_export.writing._output import ALIGNMENT

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Buffers:
    """Buffers of each thread, by what they are for."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, use: str, nbytes: int, target: int = 0) -> Array:
        """This thread's buffer for `use`, at an address that suits writing to offset `target` past the page cache."""
        import numpy as np

        room = nbytes + 2 * ALIGNMENT
        whole: Array | None = getattr(self._local, use, None)
        if whole is None or len(whole) < room:
            whole = np.frombuffer(_memory(max(room, SLAB + 2 * ALIGNMENT)), np.uint8)
            setattr(self._local, use, whole)
        start = target % ALIGNMENT
        return whole[start : start + nbytes]


def _memory(nbytes: int) -> mmap.mmap:
    """Memory in large pages, if the system has such: the first touch and a write past the page cache take their time by
    the page."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            found.madvise(mmap.MADV_HUGEPAGE)
    return found
