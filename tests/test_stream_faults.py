"""A streamed merge that is run twice at once, given wrong bytes or no room: it goes on, or says why not."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stream_fault_tools
from loopback import Fault, LoopbackHub
from stream_fault_tools import FIRST, FOURTH, SECOND, failing, fetched, nothing, same, stored, stream, weights

from fossil_export import FossilExportError, StreamResult, merge_to_hub, plan_stream
from fossil_export.publishing._stream import run_stream
from fossil_export.storage import fetch

scene = stream_fault_tools.scene


def test_an_upload_fails(scene: LoopbackHub, tmp_path: Path) -> None:
    scene.fault(Fault("PUT", "/storage/", status=403, skip=1, times=None))
    line = failing(
        tmp_path,
        r"the storage host localhost refuses this.*\(1 of 3 files are uploaded; the same command goes on from there\)$",
    )
    assert line.startswith(f"ada/new: uploading {SECOND}: ") and nothing(scene)
    assert fetched(scene) == [FIRST, SECOND] and len(weights(tmp_path / "cache")) == 1
    scene.clear_faults()
    (first,) = stored(scene)
    scene.reset_log()
    result = stream(tmp_path)
    assert same(scene) and result.resumed == 1 and fetched(scene) == [SECOND, FOURTH]
    assert len(stored(scene)) == 2 and first not in stored(scene)
    assert not list((tmp_path / "cache" / "stream").iterdir())


@pytest.mark.parametrize("times", [1, 2])
def test_the_commit_fails(times: int, scene: LoopbackHub, tmp_path: Path) -> None:
    for _ in range(times):
        scene.fault(Fault("POST", "/commit/", status=403))
        failing(tmp_path, r"committing: your token may not do that.*\(3 of 3 files are uploaded")
        assert nothing(scene)
    scene.reset_log()
    result = stream(tmp_path)
    assert same(scene) and result.resumed == 3 and fetched(scene) == [] == stored(scene)
    assert len(result.survival) == 4


def test_wrong_bytes(scene: LoopbackHub, tmp_path: Path) -> None:
    plan = plan_stream("ada/qv")
    fetch(plan.merge.adapter.needed)
    once = Fault("GET", "/cdn/", corrupt=True, skip=1)
    scene.fault(once)
    scene.reset_log()
    run_stream(plan, "ada/new", cache_dir=tmp_path / "cache")
    assert once.times == 0 and same(scene) and fetched(scene) == [FIRST, SECOND, SECOND, FOURTH]

    scene.create("ada/new")
    scene.fault(Fault("GET", "/cdn/", corrupt=True, times=2))
    with pytest.raises(FossilExportError, match=f"ada/base: {FIRST} came twice with other bytes than the Hub lists"):
        run_stream(plan, "ada/new", cache_dir=tmp_path / "cache")
    assert nothing(scene) and not list((tmp_path / "cache" / "stream").iterdir())


def test_a_damaged_header(scene: LoopbackHub, tmp_path: Path) -> None:
    """A plan that was made from it is not carried out, though every file comes whole."""

    def spoil() -> None:
        folder = scene.object_path(digest)
        whole = folder.read_bytes()
        at = whole.index(b'"F32"', 8)
        folder.write_bytes(whole[:at] + b'"I32"' + whole[at + 5 :])
        kept.append((folder, whole))

    digest, kept = scene.files("ada/base")[FIRST][1], []  # type: ignore[var-annotated]
    spoil()
    plan = plan_stream("ada/qv")
    for path, whole in kept:
        path.write_bytes(whole)
    with pytest.raises(FossilExportError, match=f"ada/base: {FIRST} came with other bytes"):
        run_stream(plan, "ada/new", cache_dir=tmp_path / "cache")
    assert nothing(scene)


def test_two_at_once(scene: LoopbackHub, tmp_path: Path) -> None:
    there, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        there.set()
        assert go_on.wait(120)

    scene.fault(Fault("PUT", "/storage/", before=hang))
    results: list[StreamResult] = []
    first = threading.Thread(target=lambda: results.append(stream(tmp_path)))
    first.start()
    assert there.wait(120)
    failing(tmp_path, "the same merge is running already; wait for it")
    assert stream(tmp_path, repo="ada/other").push.changed  # another one may run
    go_on.set()
    first.join()
    assert len(results) == 1 and same(scene) and same(scene, "ada/other")
    assert not list((tmp_path / "cache" / "stream").iterdir())


def test_locks(scene: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system knows none, and where the run before removes the folder just now."""
    calls: list[int] = []

    def removed(descriptor: int, how: int) -> None:
        if not calls:
            (folder,) = (tmp_path / "cache" / "stream").iterdir()
            folder.rmdir()
        calls.append(descriptor)
        fcntl.flock(descriptor, how)

    def unknown(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for flock, changed in ((removed, True), (unknown, False)):
        mine = SimpleNamespace(**{**vars(fcntl), "flock": flock})
        monkeypatch.setattr("fossil_export.publishing._workplace.fcntl", mine)
        assert stream(tmp_path).push.changed == changed and same(scene)
    assert len(calls) == 2


def test_no_place_to_work(scene: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FossilExportError, match=r"cannot be written: .*; choose another --cache-dir"):
        merge_to_hub("ada/qv", "ada/new", cache_dir=tmp_path / "file")
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: usage)
        failing(tmp_path, r"takes 37,\d+ bytes at once, 1,000 are free; make room, or work elsewhere with --cache-dir")
    for target in ("fossil_export.publishing._carrier.Writer.change", "huggingface_hub.hf_hub_download"):

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            line = failing(tmp_path, "writing failed: No space left on device; make room, or work elsewhere with --c")
            assert line.count(FIRST) == 1
    assert nothing(scene) and not list(tmp_path.glob("cache/stream/*/journal.json"))
    assert stream(tmp_path).resumed == 0 and same(scene)


def test_a_device_that_is_not_there_is_told_first(scene: LoopbackHub, tmp_path: Path) -> None:
    failing(tmp_path, "cuda", device="cuda:99")
    assert "ada/new" not in scene.repos() and not (tmp_path / "cache").exists()


def test_a_target_that_will_refuse_is_told_first(scene: LoopbackHub, tmp_path: Path) -> None:
    scene.create("ada/new")
    for files, said in (
        ({"adapter_config.json": b"{}"}, "ada/new: holds an adapter"),
        ({"README.md": b"---\na: [\n---\n"}, "ada/new: README.md: line"),
    ):
        head = scene.commit("ada/new", files)
        failing(tmp_path, said)
        assert scene.head("ada/new") == head and fetched(scene) == [] == stored(scene)
        scene.commit("ada/new", {}, delete=files)
    scene.create("bob/model")
    failing(tmp_path, "your token may not do that.*; or open a pull request with --create-pr", repo="bob/model")
    assert fetched(scene) == [] == stored(scene)
    assert not list((tmp_path / "cache" / "stream").iterdir())
