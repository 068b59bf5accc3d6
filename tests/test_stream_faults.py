"""A streamed merge that is interrupted, killed, run twice at once or given wrong bytes: it goes on, or says why not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ADA, make_adapter, make_base
from huggingface_hub import hf_hub_download
from huggingface_hub.lfs import UploadInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import Fault, LoopbackHub, environment

from fossil_export import FossilExportError, StreamResult, merge, merge_to_hub, plan_stream, storage
from fossil_export.merging.run import Runner
from fossil_export.merging.survival import Survival
from fossil_export.publishing.journal import Journal
from fossil_export.publishing.repository import Repository
from fossil_export.publishing.stream import run_stream
from fossil_export.publishing.workplace import workplace


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_base(folder / "base")
    make_adapter(folder / "qv", folder / "base", target_modules=["q_proj", "v_proj"])
    make_adapter(folder / "k", folder / "base", target_modules=["k_proj"])
    for name in ("qv", "k"):
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "ada/base"}))
    return folder


EXPECTED: dict[str, tuple[int, str]] = {}


@pytest.fixture
def scene(hub: LoopbackHub, parts: Path, tmp_path: Path) -> LoopbackHub:
    """Base and adapter on the Hub. In EXPECTED is what an undisturbed merge publishes: commits there go by content."""
    hub.add_folder("ada/base", parts / "base")
    hub.add_folder("ada/qv", parts / "qv")
    if not EXPECTED:
        merged = merge(parts / "qv", tmp_path / "merged", base=parts / "base").output
        merge_to_hub("ada/qv", "ada/expected", cache_dir=tmp_path / "other")
        EXPECTED.update(without_card(hub, "ada/expected"))
        for path in weights(merged):
            assert hub.read("ada/expected", path.name) == path.read_bytes()
        hub.reset_log()
    return hub


def without_card(hub: LoopbackHub, repo: str) -> dict[str, tuple[int, str]]:
    return {name: entry for name, entry in hub.files(repo).items() if name != "README.md"}


def stream(tmp_path: Path, repo: str = "ada/new", **options: Any) -> StreamResult:
    return merge_to_hub("ada/qv", repo, cache_dir=tmp_path / "cache", **options)


def failing(tmp_path: Path, match: str, **options: Any) -> str:
    with pytest.raises(FossilExportError, match=match) as raised:
        stream(tmp_path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    assert without_card(hub, repo) == EXPECTED
    return len(hub.commits(repo)) == 2


def nothing(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    return set(hub.files(repo)) == {".gitattributes"}


def stored(hub: LoopbackHub) -> list[str]:
    """SHA-256 of what was uploaded, in order."""
    return [seen.path.split("/")[4] for seen in hub.log if seen.method == "PUT" and seen.status == 200]


def fetched(hub: LoopbackHub) -> list[str]:
    """Names of the base's files that were fetched whole."""
    names = {digest: name for name, (_, digest) in hub.files("ada/base").items()}
    whole = [seen for seen in hub.log if seen.method == "GET" and seen.path.startswith("/cdn/") and seen.status == 200]
    return [names[seen.path.split("/")[2]] for seen in whole if seen.path.split("/")[2] in names]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


FIRST, SECOND, FOURTH = (f"model-0000{number}-of-00007.safetensors" for number in (1, 2, 4))


def test_an_upload_fails(scene: LoopbackHub, tmp_path: Path) -> None:
    scene.fault(Fault("PUT", "/storage/", status=403, skip=1, times=None))
    line = failing(tmp_path, r"may not do that.*\(1 of 3 files are uploaded; the same command goes on from there\)$")
    assert line.startswith(f"ada/new: uploading {SECOND}: ") and nothing(scene)
    assert fetched(scene) == [FIRST, SECOND] and len(weights(tmp_path / "cache")) == 1
    scene.clear_faults()
    (first,) = stored(scene)
    scene.reset_log()
    result = stream(tmp_path)
    assert same(scene) and result.resumed == 1 and fetched(scene) == [SECOND, FOURTH]
    assert len(stored(scene)) == 2 and first not in stored(scene)
    assert not list((tmp_path / "cache" / "stream").iterdir())


def test_an_interrupted_pull_request_goes_on(scene: LoopbackHub, tmp_path: Path) -> None:
    """Into a repository that one may not write to, and so the Hub copies nothing into it."""
    scene.create("bob/model")
    options: dict[str, Any] = {"repo": "bob/model", "create_pr": True}
    scene.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "7 of 7 files are uploaded", **options)
    scene.reset_log()
    assert stream(tmp_path, **options).resumed == 7 and fetched(scene) == [] == stored(scene)
    assert set(scene.files("bob/model")) == {".gitattributes"} < set(scene.files("bob/model", "refs/pr/1"))


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


def test_killed(scene: LoopbackHub, tmp_path: Path) -> None:
    """SIGKILL while the second file is on its way."""
    on_the_way = threading.Event()
    scene.fault(Fault("PUT", "/storage/", skip=1, before=on_the_way.set, trickle=(500, 0.05)))
    command = ["merge", "ada/qv", "--push-to-hub", "ada/new", "--stream", "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fossil_export", *command],
        env=environment(scene, tmp_path / "home of child", ADA),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert on_the_way.wait(30)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL and process.stdout is not None and process.stdout.read() == b""
    process.stdout.close()
    assert nothing(scene) and len(weights(tmp_path / "cache")) == 1
    scene.clear_faults()
    scene.reset_log()
    result = stream(tmp_path)
    assert result.resumed == 1 and same(scene) and fetched(scene) == [SECOND, FOURTH] and len(stored(scene)) == 2
    assert not list((tmp_path / "cache" / "stream").iterdir())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_half_merged_files_are_not_taken_for_the_bases(
    moment: str, scene: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = Runner.change

    def interrupted(self: Runner, *arguments: Any) -> Any:
        if moment == "after":
            change(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "change", interrupted)
        # As if the process had died, and could remove nothing.
        patch.setattr("fossil_export.publishing.workplace._is_of_use", lambda folder: True)
        with pytest.raises(KeyboardInterrupt):
            stream(tmp_path)
    (left,) = weights(tmp_path / "cache")
    assert left.parent.name == "merging" and (moment == "before") == (
        left.read_bytes() == scene.read("ada/base", FIRST)
    )
    place = left.parent.parent / "base" / FIRST
    assert list(place.parent.rglob(f"{FIRST}.metadata")) and not place.exists()
    place.write_bytes(b"x" * left.stat().st_size)  # nor there, where the client would take it
    scene.reset_log()
    stream(tmp_path)
    assert same(scene) and fetched(scene)[0] == FIRST


def test_what_was_fetched_is_kept(scene: LoopbackHub, tmp_path: Path) -> None:
    """An interrupted run's file of the base, whole, is taken; another, or a damaged one, is not."""
    scene.fault(Fault("POST", "/objects/batch", status=403, times=1))
    failing(tmp_path, "may not do that")
    folder = tmp_path / "again"
    plan = plan_stream("ada/qv")
    with workplace(plan, Repository("ada/new"), folder) as place:
        for name in (FIRST, SECOND):
            hf_hub_download("ada/base", name, revision=scene.head("ada/base"), local_dir=place / "base")
    assert len(weights(folder)) == 2
    (place / "base" / FOURTH).write_bytes(b"stray")
    scene.reset_log()
    merge_to_hub("ada/qv", "ada/new", cache_dir=folder)
    assert same(scene) and fetched(scene) == [SECOND, FOURTH]

    scene.create("ada/new")
    with workplace(plan, Repository("ada/new"), folder) as place:
        path = Path(hf_hub_download("ada/base", FIRST, revision=scene.head("ada/base"), local_dir=place / "base"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    scene.reset_log()
    merge_to_hub("ada/qv", "ada/new", cache_dir=folder)
    assert same(scene) and fetched(scene) == [FIRST, SECOND, FOURTH]


def interrupted(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A merge that has all but the commit; returns its journal."""
    hub.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "3 of 3 files are uploaded")
    hub.reset_log()
    (journal,) = tmp_path.glob("cache/stream/*/journal.json")
    return journal


def test_the_hub_forgot(scene: LoopbackHub, tmp_path: Path) -> None:
    """Uploads that no commit holds may be gone after a while; so may one of them."""
    journal = json.loads(interrupted(scene, tmp_path).read_text())
    del scene._repos["ada/new"].objects[journal[FIRST]["sha256"]]
    result = stream(tmp_path)
    assert same(scene) and result.resumed == 2 and fetched(scene) == [FIRST] and len(stored(scene)) == 1
    assert list(result.survival) == list(stream(tmp_path, repo="ada/other").survival)

    scene.create("ada/new")
    interrupted(scene, tmp_path)
    scene._repos["ada/new"].objects.clear()
    assert stream(tmp_path).resumed == 0 and same(scene)


def test_a_damaged_journal(scene: LoopbackHub, tmp_path: Path) -> None:
    path = interrupted(scene, tmp_path)
    text = path.read_text()
    assert len(Journal(path).done) == 3
    for damaged in (
        text[: len(text) // 2],
        "",
        "null",
        "[1, 2]",
        json.dumps({FIRST: {}}),
        text.replace('"sha256": "', '"sha256": "zz'),
        text.replace('"sample": "', '"sample": "!'),
        text.replace('"size": 37', '"size": 0.37'),
        text.replace('"survival": {', '"survival": {"a": {"lost": 1}, '),
        "\x00\xff" * 100,
    ):
        path.write_text(damaged)
        assert Journal(path).done == {}
    path.write_text(text[:-2])
    assert stream(tmp_path).resumed == 0 and same(scene)
    # What the Hub has is not sent again, whatever the journal says.
    assert fetched(scene) == [FIRST, SECOND, FOURTH] and stored(scene) == []


def test_a_journal_is_of_one_merge(scene: LoopbackHub, parts: Path, tmp_path: Path) -> None:
    """Another adapter, base, layout, dtype, branch or target does not take it up; the same one does."""
    interrupted(scene, tmp_path)
    scene.commit("ada/base", {"LICENSE": b"other"}, branch="v2")
    places = {workplace_of(tmp_path, "ada/qv")}
    for adapter, repo, base, options in [
        (parts / "k", {}, None, {}),
        ("ada/qv", {}, "ada/base@v2", {}),
        ("ada/qv", {}, parts / "base", {}),
        ("ada/qv", {}, None, {"dtype": "bfloat16"}),
        ("ada/qv", {}, None, {"max_shard_size": "60KB"}),
        ("ada/qv", {"repo_id": "ada/other"}, None, {}),
        ("ada/qv", {"revision": "v2"}, None, {}),
        ("ada/qv", {"create_pr": True}, None, {}),
    ]:
        place = workplace_of(tmp_path, adapter, repo, base, **options)
        assert place not in places
        places.add(place)
    (parts / "base" / FIRST).touch()
    assert workplace_of(tmp_path, "ada/qv", {}, parts / "base") not in places
    scene.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "3 of 3", revision="v3")
    scene.reset_log()
    assert stream(tmp_path, revision="main").resumed == 3 and same(scene) and stored(scene) == []


def workplace_of(
    tmp_path: Path, adapter: str | Path, repo: dict[str, Any] | None = None, base: Any = None, **options: Any
) -> Path:
    plan, repository = plan_stream(adapter, base, **options), Repository(**{"repo_id": "ada/new"} | (repo or {}))
    with workplace(plan, repository, tmp_path / "cache") as place:
        return place


@given(
    st.dictionaries(
        st.text(max_size=9),
        st.tuples(
            st.integers(0, 1 << 60),
            st.binary(min_size=32, max_size=32),
            st.binary(max_size=512),
            st.dictionaries(st.text(max_size=9), st.tuples(*[st.floats(allow_nan=False)] * 3), max_size=3),
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_journal_comes_back(done: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.json"
        journal = Journal(path)
        for name, (size, digest, sample, sums) in done.items():
            survival = {tensor: Survival(*values) for tensor, values in sums.items()}
            journal.add(name, UploadInfo(size, sample, digest), survival)
        again = Journal(path)
        assert again.done == journal.done and not list(path.parent.glob(".*"))
        for name, (size, digest, sample, sums) in done.items():
            assert again.survival(name) == {tensor: Survival(*values) for tensor, values in sums.items()}
            if name not in ("", ".") and "/" not in name and name != "..":
                upload = again.operation(name).upload_info
                assert (upload.size, upload.sha256, upload.sample) == (size, digest, sample)
        for cut in (1, 7, path.stat().st_size // 2) if path.exists() else ():
            path.write_bytes(path.read_bytes()[:-cut])
            assert Journal(path).done in ({}, again.done)


# Wrong bytes, two at once, no room


def test_wrong_bytes(scene: LoopbackHub, tmp_path: Path) -> None:
    plan = plan_stream("ada/qv")
    storage.fetch(plan.merge.adapter.needed)
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
        assert go_on.wait(20)

    scene.fault(Fault("PUT", "/storage/", before=hang))
    results: list[StreamResult] = []
    first = threading.Thread(target=lambda: results.append(stream(tmp_path)))
    first.start()
    assert there.wait(20)
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
        monkeypatch.setattr("fossil_export.publishing.workplace.fcntl", mine)
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
    for target in ("fossil_export.publishing.carrier.Runner.change", "huggingface_hub.hf_hub_download"):

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


def test_an_interrupted_passing_through_goes_on(scene: LoopbackHub, tmp_path: Path) -> None:
    scene.refuse_copies = True
    scene.fault(Fault("PUT", "/storage/", status=403, skip=5, times=None))
    failing(tmp_path, r"may not do that.*\(5 of 7 files are uploaded")
    assert nothing(scene)
    scene.clear_faults()
    before = set(stored(scene))
    scene.reset_log()
    result = stream(tmp_path)
    assert result.resumed == 5 and len(fetched(scene)) == 2 == len(stored(scene)) and not before & set(stored(scene))
    assert same(scene) and result.copied == ()
