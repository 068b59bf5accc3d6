"""The checksum of a file is that of its pieces added up, with and without the compiled loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fossil_export.kernels import library
from fossil_export.writing._checksum import checksum


def plainly(data: bytes) -> int:
    """As the formula says it."""
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return sum(word * (2 * number + 1) for number, word in enumerate(words)) % (1 << 64)


@given(st.integers(0, 2**32), st.integers(0, 3000), st.lists(st.integers(0, 3000), max_size=6))
def test_pieces_add_up_to_the_whole(seed: int, size: int, cuts: list[int]) -> None:
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    edges = [0, *sorted(cut for cut in cuts if cut < size), size]
    pieces = [checksum(data[a:b], a) for a, b in pairwise(edges)]
    assert sum(pieces) % (1 << 64) == plainly(data.tobytes())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_large_piece_has_the_sum_of_the_formula(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("FOSSIL_EXPORT_KERNELS", "0")
    library.cache_clear()
    try:
        data = np.random.default_rng(1).integers(0, 256, 700_003, np.uint8)
        wanted = plainly(bytes(24) + data.tobytes())
        assert checksum(data, 24) == wanted
        other: Any = data.copy()
        other[[5, 400_000]] = other[[400_000, 5]]
        assert checksum(other, 24) != wanted
    finally:
        library.cache_clear()
