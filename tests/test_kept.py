"""Trained tensors that threads share are made once, stay while there is room, and cannot be written to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fossil_export.merging import _kept
from fossil_export.merging._kept import Kept


def test_many_threads_make_a_tensor_once() -> None:
    kept, made, gate = Kept(), [], threading.Barrier(8)

    def use() -> int:
        gate.wait()
        return id(kept.get("a", lambda: made.append(1) or np.zeros(10)))

    with ThreadPoolExecutor(8) as pool:
        found = {job.result() for job in [pool.submit(use) for _ in range(8)]}
    assert len(made) == 1 and len(found) == 1


def test_what_was_used_last_stays_within_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "ROOM", 100)
    kept, made = Kept(), []

    def get(name: str, size: int) -> None:
        kept.get(name, lambda: made.append(name) or np.zeros(size, np.uint8))

    for name in ("a", "b", "a", "c", "a", "b"):  # b goes for c, and c for b
        get(name, 40)
    assert made == ["a", "b", "c", "b"]
    get("large", 1000)  # alone, it may be larger than the room
    get("large", 1000)
    assert made.count("large") == 1


def test_nobody_writes_to_what_others_use() -> None:
    array = Kept().get("a", lambda: np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        array += 1
