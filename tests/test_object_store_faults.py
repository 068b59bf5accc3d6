"""What goes wrong between this machine and an object store: objects that change, answers that are cut short, servers
that are too busy; and the blocks in which weights are read, which must not grow."""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_adapter, make_base
from hub_tools import content
from s3_tools import S3Server, fault
from safetensors.numpy import load_file, save_file

from fossil_export import merge, plan_merge
from fossil_export.errors import MergeError, StorageError
from fossil_export.merging._merge import run_merge
from fossil_export.storage.fsspec import _errors as errors
from fossil_export.storage.fsspec import _source as reading
from fossil_export.storage.fsspec._blocks import BLOCK, CONNECTIONS, HELD, Blocks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_adapter(folder / "adapter", make_base(folder / "base"))
    return folder


@pytest.fixture
def store(s3: S3Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(errors, "PAUSE", 0.01)
    s3.add_folder(models / "base", "models", "base")
    return s3


def put(store: S3Server, models: Path, name: str, change: Any) -> None:
    """The object base/`name` with its bytes changed in place."""
    found = bytearray((models / "base" / name).read_bytes())
    change(found)
    store.client().put_object(Bucket="models", Key=f"base/{name}", Body=bytes(found))


def flip(found: bytearray) -> None:
    found[-1] ^= 1


SHARD = "model-00003-of-00007.safetensors"
CHANGED = (
    rf"^s3://models/base/{SHARD}: changed while it was being read; wait until whatever writes it is done, then run"
)


def test_an_object_that_changed_since_the_plan(store: S3Server, models: Path, tmp_path: Path) -> None:
    plan = plan_merge(models / "adapter", "s3://models/base")
    put(store, models, SHARD, flip)  # as long as before, with the same header
    with pytest.raises(StorageError, match=CHANGED):
        run_merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_object_that_changes_after_it_was_opened(store: S3Server, models: Path, tmp_path: Path) -> None:
    plan = plan_merge(models / "adapter", "s3://models/base")

    def change(what: str, status: int) -> None:
        if what == f"HEAD /models/base/{SHARD}":
            store.after = None
            store.add_folder(other, "models", "base")

    other = tmp_path / "other"
    other.mkdir()
    found = bytearray((models / "base" / SHARD).read_bytes())
    flip(found)
    (other / SHARD).write_bytes(found)
    store.after = change
    with pytest.raises(StorageError, match=CHANGED):
        run_merge(plan, tmp_path / "out")
    assert store.after is None and not (tmp_path / "out").exists()


def test_a_small_file_that_changed_since_it_was_listed(store: S3Server, models: Path) -> None:
    plan = plan_merge(models / "adapter", "s3://models/base")
    store.client().put_object(Bucket="models", Key="base/LICENSE", Body=b"Apache-9.9")
    with pytest.raises(StorageError, match=r"^s3://models/base/LICENSE: changed while"):
        plan.base.home.fetch(["LICENSE"])
    assert not (plan.base.home.path / "LICENSE").exists()
    store.client().delete_object(Bucket="models", Key="base/chat_template.jinja")
    with pytest.raises(StorageError, match=r"chat_template.jinja: there is no such bucket, folder or file .*; check"):
        plan.base.home.fetch(["chat_template.jinja"])


def test_answers_that_are_cut_short_or_refused_come_again(store: S3Server, models: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    cut: list[str] = []
    lock = threading.Lock()

    def trouble(environ: dict[str, Any]) -> Any:
        what = environ["PATH_INFO"] + environ.get("HTTP_RANGE", "")
        if environ["REQUEST_METHOD"] != "GET" or ".safetensors" not in what:
            return None
        with lock:
            seen[what] = seen.get(what, 0) + 1
            first, number = seen[what] == 1, len(seen)
        if first and number % 3 == 0:
            return fault("500 Internal Server Error")
        if first and number % 3 == 1:
            cut.append(what)
            return "206 Partial Content", {"Content-Type": "binary/octet-stream"}, b"1234"
        return None

    store.before = trouble
    merge(models / "adapter", tmp_path / "there", base="s3://models/base")
    assert len(cut) > 4
    merge(models / "adapter", tmp_path / "here", base=models / "base")
    mine, theirs = content(tmp_path / "here"), content(tmp_path / "there")
    assert [name for name in mine if mine[name] != theirs[name]] == ["fossil_export.json"]


def test_answers_that_stay_short(store: S3Server, models: Path, tmp_path: Path) -> None:
    plan = plan_merge(models / "adapter", "s3://models/base")
    short = "206 Partial Content", {"Content-Type": "binary/octet-stream"}, b"1234"
    store.before = lambda environ: short if environ["PATH_INFO"].endswith(SHARD) and "HTTP_RANGE" in environ else None
    with pytest.raises(StorageError, match=rf"{SHARD}: cannot be read: 4 bytes came of [\d,]+ from byte 0 on; run the"):
        run_merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_access_that_is_denied(store: S3Server, models: Path) -> None:
    store.before = lambda environ: fault("403 Forbidden")
    with pytest.raises(StorageError, match=r"^s3://models/base: access is denied \(.*\); check whose credentials"):
        plan_merge(models / "adapter", "s3://models/base")


def test_a_base_that_holds_what_it_must_not_is_named_by_its_address(
    store: S3Server, models: Path, tmp_path: Path
) -> None:
    broken = load_file(models / "base" / SHARD)
    name = next(name for name in broken if name.endswith("_proj.weight"))
    broken[name][0, 0] = np.nan
    save_file(broken, tmp_path / SHARD, {"format": "pt"})
    store.client().upload_file(str(tmp_path / SHARD), "models", f"base/{SHARD}")
    with pytest.raises(MergeError, match=rf"^s3://models/base/{SHARD}: {name} holds infinite or NaN values"):
        merge(models / "adapter", tmp_path / "out", base="s3://models/base")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "there are no credentials for"),
        (type("EndpointConnectionError", (ConnectionError,), {})("refused"), "its server cannot be reached"),
        (type("FSTimeoutError", (Exception,), {})(), "its server does not answer in time"),
        (type("SSLError", (Exception,), {})("self-signed"), "the certificate of its server is not trusted"),
        (type("HttpError", (Exception,), {"code": 429})("slow down"), "its server is too busy"),
        (type("HttpResponseError", (Exception,), {"status_code": 403})("no"), "access is denied"),
        (OSError(5, "https://a.b/c?X-Amz-Signature=hidden failed\nand more"), "cannot be read: https://a.b/c?… failed"),
        (ValueError("s3://me:hidden@bucket is odd"), "cannot be read: s3://…@bucket is odd"),
    ],
)
def test_what_file_systems_raise_is_one_line_with_a_remedy(problem: Exception, said: str) -> None:
    line = str(errors.explained(problem, "s3://models/base"))
    assert line.startswith(f"s3://models/base: {said}") and "; " in line
    assert "hidden" not in line and "\n" not in line


class Counting:
    """A place with one file. Its first requests wait until `together` of them are there, on a busy machine too."""

    address = "counting://"

    def __init__(self, size: int, pause: float = 0.002) -> None:
        self.size, self.pause, self.block = size, pause, BLOCK
        self.asked: list[int] = []
        self.now = self.most = self.together = 0
        self.fails: set[int] = set()
        self.lock = threading.Condition()

    def range(self, name: str, start: int, stop: int) -> bytes:
        with self.lock:
            self.asked.append(start)
            self.now += 1
            self.most = max(self.most, self.now)
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.most >= self.together, timeout=30)
        time.sleep(self.pause)
        with self.lock:
            self.now -= 1
        if start in self.fails:
            self.fails.remove(start)
            raise StorageError("told to")
        return bytes([start // self.block % 251]) * (stop - start)

    def check_state(self, name: str) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Counting:
    found = Blocks()
    monkeypatch.setattr(reading, "blocks", lambda: found)
    return Counting(120 * BLOCK + 1234)


def test_weights_are_read_once_by_several_requests_in_bounded_memory(place: Counting) -> None:
    file = reading.RemoteFile(place, "weights", place.size)
    step, at = (5 << 20) + 13, 1000  # pieces that are no blocks, by twelve threads in nearly their order
    place.together = 4
    finished = {start: threading.Event() for start in range(at, place.size, step)}

    def read(start: int) -> None:
        if start - 8 * step in finished:  # as the merge does, no thread runs far ahead of another
            assert finished[start - 8 * step].wait(60)
        out = np.empty(min(step, place.size - start), np.uint8)
        file.read(start, out)
        for offset in (0, len(out) // 2, len(out) - 1):
            assert out[offset] == (start + offset) // BLOCK % 251
        finished[start].set()

    tracemalloc.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(read, finished))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    again = len(place.asked) - len(set(place.asked))
    assert sorted(set(place.asked)) == list(range(0, place.size, BLOCK)) and again <= 12
    assert 4 <= place.most <= CONNECTIONS
    assert peak < (HELD + 2) * BLOCK + 12 * (step + 2 * BLOCK)
    file.close()
    assert not file._blocks._blocks and file._blocks._held == 0


def test_one_reader_has_the_next_blocks_on_their_way(place: Counting) -> None:
    place.together = 4
    file = reading.RemoteFile(place, "weights", place.size)
    out = np.empty(1 << 20, np.uint8)
    for start in range(0, 60 * BLOCK, len(out)):
        file.read(start, out)
    assert place.most >= 4 and len(place.asked) == len(set(place.asked))
    file.close()


def test_any_reads_at_once(place: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks in memory, many readers, pieces larger than all of it: no reader waits forever, and all get theirs."""
    block = place.block = 1 << 12
    monkeypatch.setattr(reading, "BLOCK", block)
    place.size, place.pause = 20 * block + 77, 0.0
    file = reading.RemoteFile(place, "weights", place.size)
    file._blocks = few = Blocks(connections=2, held=2)
    pieces = random.Random(0)

    def read(number: int) -> None:
        start = pieces.randrange(place.size)
        out = np.empty(pieces.randrange(place.size - start + 1), np.uint8)
        file.read(start, out)
        assert (out == (np.arange(start, start + len(out)) // block % 251).astype(np.uint8)).all()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(read, range(200)))
    assert few.peak <= 2


def test_rows_of_columns(place: Counting) -> None:
    file = reading.RemoteFile(place, "weights", place.size)
    for stride, width, count in ((3000, 70, 5000), (BLOCK // 2 + 5, 1000, 9), (2 * BLOCK, 11, 4), (64, 64, 100)):
        out = np.empty((count, width), np.uint8)
        file.read_rows(777, stride, out)
        at = 777 + np.arange(count)[:, None] * stride + np.arange(width)
        assert (out == (at // BLOCK % 251).astype(np.uint8)).all()
    file.read_rows(0, 10, np.empty((0, 4), np.uint8))


def test_what_failed_is_asked_for_again(place: Counting) -> None:
    file = reading.RemoteFile(place, "weights", place.size)
    place.fails = {0}
    out = np.empty(10, np.uint8)
    with pytest.raises(StorageError, match="told to"):
        file.read(0, out)
    file.read(0, out)
    assert place.asked.count(0) == 2
    file.close()
