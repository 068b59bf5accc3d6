"""A streamed merge that is interrupted or killed goes on where it stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import stream_fault_tools
from conftest import ADA
from huggingface_hub import hf_hub_download
from loopback import Fault, LoopbackHub, environment
from stream_fault_tools import (
    FIRST,
    FOURTH,
    SECOND,
    failing,
    fetched,
    nothing,
    same,
    stored,
    stream,
    weights,
)

from fossil_export import merge_to_hub, plan_stream
from fossil_export.merging._run import Writer
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._workplace import workplace

scene = stream_fault_tools.scene


def test_an_interrupted_pull_request_goes_on(scene: LoopbackHub, tmp_path: Path) -> None:
    """Into a repository that one may not write to, and so the Hub copies nothing into it."""
    scene.create("bob/model")
    options: dict[str, Any] = {"repo": "bob/model", "create_pr": True}
    scene.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "7 of 7 files are uploaded", **options)
    scene.reset_log()
    assert stream(tmp_path, **options).resumed == 7 and fetched(scene) == [] == stored(scene)
    assert set(scene.files("bob/model")) == {".gitattributes"} < set(scene.files("bob/model", "refs/pr/1"))


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
    assert on_the_way.wait(120)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL and process.stdout is not None and process.stdout.read() == b""
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
    change = Writer.change

    def interrupted(self: Writer, *arguments: Any) -> Any:
        if moment == "after":
            change(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "change", interrupted)
        # As if the process had died, and could remove nothing.
        patch.setattr("fossil_export.publishing._workplace._is_of_use", lambda folder: True)
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


def test_an_interrupted_passing_through_goes_on(scene: LoopbackHub, tmp_path: Path) -> None:
    scene.refuse_copies = True
    scene.fault(Fault("PUT", "/storage/", status=403, skip=5, times=None))
    failing(tmp_path, r"the storage host localhost refuses this.*\(5 of 7 files are uploaded")
    assert nothing(scene)
    scene.clear_faults()
    before = set(stored(scene))
    scene.reset_log()
    result = stream(tmp_path)
    assert result.resumed == 5 and len(fetched(scene)) == 2 == len(stored(scene)) and not before & set(stored(scene))
    assert same(scene) and result.copied == ()
