"""A checksum that may be added up from the pieces of a file, in whatever order they are written.

Of the file's 8-byte words w, little-endian, the last filled up with zeros: Σ w · (2 i + 1) mod 2⁶⁴, i the number of the
word. It finds what gets lost, exchanged or cut, at the speed of memory; it is no defence against an attacker.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from fossil_export.kernels import library

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_MODULUS = 1 << 64


def checksum(data: Array, offset: int) -> int:
    """What the bytes `data` (uint8, contiguous) at `offset` of a file add to its checksum."""
    head = min(-offset % 8, len(data))
    count = (len(data) - head) // 8
    tail = head + 8 * count
    total = _edge(data[:head], offset) + _edge(data[tail:], offset + tail)
    if count:
        first = (offset + head) // 8
        plain, weighted = _sums(data[head:tail])
        total += plain * (2 * first + 1) + 2 * weighted
    return total % _MODULUS


def _edge(data: Array, offset: int) -> int:
    """Of bytes that lie within one word."""
    word = int.from_bytes(data.tobytes(), "little") << (8 * (offset % 8))
    return word * (2 * (offset // 8) + 1)


def _sums(words: Array) -> tuple[int, int]:
    """Σ word and Σ index · word of whole words, mod 2⁶⁴."""
    import numpy as np

    kernels = library()
    if kernels is not None:
        sums = (ctypes.c_uint64 * 2)()
        kernels.fossil_word_sums(words.ctypes.data, len(words) // 8, sums)
        return int(sums[0]), int(sums[1])
    found = np.frombuffer(words, "<u8") if words.ctypes.data % 8 == 0 else np.frombuffer(words.tobytes(), "<u8")
    plain = weighted = 0
    block = 1 << 15
    index = np.arange(min(block, len(found)), dtype=np.uint64)
    for start in range(0, len(found), block):
        part = found[start : start + block]
        own = int(part.sum(dtype=np.uint64))
        plain += own
        weighted += start * own + int((index[: len(part)] * part).sum(dtype=np.uint64))
    return plain % _MODULUS, weighted % _MODULUS
