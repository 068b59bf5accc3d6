"""A file that is written in any order and sent in its own: all of it, in bounded memory, and never half of it."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fossil_export.errors import FossilExportError, OutputError
from fossil_export.writing.remote import _uploads as uploads
from fossil_export.writing.remote import _window as windows
from fossil_export.writing.remote._window import Window

UNIT = 1 << 14
SIZE = 60 * UNIT + 12345
Cuts = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(uploads, "PARTS", tuple(UNIT << number for number in range(4)))
    monkeypatch.setattr(windows, "MEMORY", 6 * UNIT)
    monkeypatch.setattr(windows, "PATIENCE", 0.05)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


class Store:
    """Keeps what it is sent; `fails` at a part."""

    def __init__(self, lanes: int = 4, fails: int | None = None) -> None:
        self.lanes, self.fails = lanes, fails
        self.parts: dict[int, bytes] = {}
        self.buffers: set[int] = set()
        self.finished = self.aborted = False
        self.open = threading.Event()
        self.open.set()

    def part(self, number: int, data: bytearray | memoryview) -> None:
        self.open.wait()
        if number == self.fails:
            raise PermissionError("no")
        address = np.frombuffer(data, np.uint8).ctypes.data
        assert address not in self.buffers, "it is still being sent"
        self.buffers.add(address)
        time.sleep(random.random() / 2000)
        self.parts[number] = bytes(data)
        self.buffers.remove(address)

    def finish(self) -> None:
        self.finished = True

    def abort(self) -> None:
        self.aborted = True

    @property
    def content(self) -> bytes:
        return b"".join(self.parts[number] for number in sorted(self.parts))


DATA = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def cuts(largest: int = 3 * UNIT) -> Cuts:
    found, start = [], 0
    draw = random.Random(0)
    while start < SIZE:
        stop = min(SIZE, start + draw.randint(1, largest))
        found.append((start, stop))
        start = stop
    return found


def shuffled(found: Cuts) -> Cuts:
    return random.Random(1).sample(found, len(found))


def interleaved(found: Cuts) -> Cuts:
    """As weights that are quantized again are written: a little of each of several places at a time."""
    third = len(found) // 3
    return [one for three in zip(found, found[third:], found[2 * third :], strict=False) for one in three] + found[
        3 * third :
    ]


def send(store: Store, order: Cuts, threads: int, **how: bool) -> Window:
    window = Window("s3://b/file", SIZE, lambda parts: store, **how)
    done = False
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda span: window.write(span[0], DATA[span[0] : span[1]].copy()), order))
        done = True
    finally:
        window.close(done)
    return window


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("order", [list, shuffled, interleaved, lambda found: found[::-1]])
def test_all_arrives_in_its_order(order: Callable[[Cuts], Cuts], lanes: int, threads: int, small_parts: Path) -> None:
    store = Store(lanes)
    spans = order(cuts())
    assert sorted(set(spans)) == sorted(cuts())
    window = send(store, list(dict.fromkeys(spans)), threads, hash=True)
    assert store.content == DATA.tobytes()
    assert window.sha256 == hashlib.sha256(DATA.tobytes()).hexdigest()
    assert store.finished and not store.aborted
    assert list(small_parts.iterdir()) == []


def test_one_that_is_written_in_its_order_needs_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_Spill", lambda: pytest.fail("it uses the disk"))
    store = Store()
    assert send(store, cuts(UNIT), threads=1).sha256 is None
    assert store.content == DATA.tobytes()


def test_writers_wait_for_what_is_on_its_way() -> None:
    store = Store(lanes=2)
    store.open.clear()
    window = Window("s3://b/file", SIZE, lambda parts: store)
    written: list[int] = []

    def write() -> None:
        for number in range(SIZE // UNIT):
            window.write(number * UNIT, DATA[number * UNIT : (number + 1) * UNIT])
            written.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and len(written) == 5  # and one buffer is kept for what comes from the disk
    store.open.set()
    thread.join()
    window.write(SIZE // UNIT * UNIT, DATA[SIZE // UNIT * UNIT :])
    window.close(True)
    assert store.content == DATA.tobytes()


def test_what_is_far_ahead_goes_to_the_disk_and_not_into_memory(
    monkeypatch: pytest.MonkeyPatch, small_parts: Path
) -> None:
    made: list[int] = []
    monkeypatch.setattr(windows, "bytearray", lambda size: made.append(size) or bytearray(size), raising=False)
    store = Store()
    send(store, cuts()[::-1], threads=4)
    assert store.content == DATA.tobytes()
    assert 2 < len(made) <= 6


def test_a_part_that_fails_ends_the_writing_and_is_aborted() -> None:
    store = Store(fails=7)
    with pytest.raises(FossilExportError, match=r"^s3://b/file: access is denied \(no\); ") as told:
        send(store, cuts(), threads=4)
    assert "\n" not in str(told.value)
    assert store.aborted and not store.finished


def test_one_that_is_given_up_is_aborted() -> None:
    store = Store()
    window = Window("s3://b/file", SIZE, lambda parts: store)
    window.write(0, DATA[: 3 * UNIT])
    window.close(False)
    assert store.aborted and not store.finished


def test_a_disk_without_room_is_told(monkeypatch: pytest.MonkeyPatch, small_parts: Path) -> None:
    def full(*given: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    store = Store()
    with pytest.raises(OutputError, match=r"cannot hold what waits to be sent: No space left .* set TMPDIR to"):
        send(store, cuts()[::-1], threads=4)
    assert store.aborted


def test_parts_are_few_enough_for_the_largest_file() -> None:
    for size in (1, 10_000 * UNIT, 10_000 * UNIT + 1, 80_000 * UNIT):
        assert -(-size // uploads.part_size(size)) <= 10_000
