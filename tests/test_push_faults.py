"""A Hub that misbehaves while `push` or a streamed merge writes to it: everything appears once, or nothing does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import push_fault_tools
import pytest
from loopback import Fault, LoopbackHub
from push_fault_tools import CASES, ENDPOINTS, puts, run, untouched, whole

from fossil_export import merge, push

no_pauses = push_fault_tools.no_pauses
arguments = push_fault_tools.arguments


@pytest.mark.parametrize("way, name", CASES)
def test_trouble(
    way: str, name: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """While it stays nothing is seen. Then the same command goes on, through more of it, and sends nothing again."""
    command = arguments(way)
    hosted.reset_log()
    method, path = ENDPOINTS[name]
    hosted.fault(Fault(method, path, status=500, times=None))
    line = run(command, 1).stderr
    assert "the Hub has trouble of its own (status 500); run the same command again later" in line
    assert untouched(hosted) and hosted.commits("ada/base")[0] == "Add folder"
    sent = {seen.path for seen in puts(hosted)}
    hosted.clear_faults()
    hosted.reset_log()
    faults = [
        Fault(method, path, status=500),
        Fault(method, path, status=429, headers={"Retry-After": "0"}),
        Fault(method, path, cut_after=10, reset=True),
        Fault(method, path, status=503),
    ]
    for fault in faults:
        hosted.fault(fault)
    run(command)
    again = {seen.path for seen in puts(hosted)}
    assert all(fault.times == 0 for fault in faults[:2])
    assert whole(hosted) and (name == "verify" or not sent & again)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "status, said",
    [
        (401, "log in with `hf auth login`"),
        (403, "your token may not do that"),
        (404, "run the same command|check the name|see http"),
        (
            429,
            "asks for fewer requests(; wait a few minutes|, and for a pause of 60 minutes; run the same command after)",
        ),
        (413, r"the Hub refuses this \(status 413\)"),
    ],
)
def test_refusals(status: int, said: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    command = arguments("push")
    for name in ("preupload", "batch", "commit"):
        hosted.clear_faults()
        method, path = ENDPOINTS[name]
        pause = {"Retry-After": "3600" if name == "commit" else "0"}  # an hour is not waited
        hosted.fault(Fault(method, path, status=status, times=None, headers=pause))
        line = run(command, 1).stderr
        assert re.search(said, line) and line.startswith("error: ada/new: ") and untouched(hosted)


@pytest.mark.parametrize("way", ["push", "stream"])
def test_the_branch_moves(way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    """Somebody else's change stays, their card too, as it is by then."""
    command = arguments(way)
    hosted.create("ada/new")
    for theirs in ({"theirs.txt": b"theirs"}, {"README.md": b"# A\nTheir words.\n"}):
        hosted.fault(Fault("POST", "/commit/", before=lambda theirs=theirs: hosted.commit("ada/new", theirs)))
    hosted.fault(Fault("POST", "/commit/", status=409))
    hosted.fault(Fault("POST", "/lfs/verify", after=lambda: hosted.commit("ada/new", {"pytorch_model.bin": b"old"})))
    run(command)
    assert "theirs.txt" in hosted.files("ada/new") and "config.json" in hosted.files("ada/new")
    assert b"Their words." in hosted.read("ada/new", "README.md") and "pytorch_model.bin" not in hosted.files("ada/new")
    assert b"fossil-export: begin" in hosted.read("ada/new", "README.md") and len(hosted.commits("ada/new")) == 5

    hosted.create("ada/new")
    hosted.fault(Fault("POST", "/commit/", before=lambda: hosted.commit("ada/new", {"x.txt": b"x"}), times=None))
    assert "somebody else changed it at the same time" in run(command, 1).stderr
    assert set(hosted.files("ada/new")) == {".gitattributes", "x.txt"}


def test_a_file_that_changes_after_it_was_looked_at(hosted: LoopbackHub, tmp_path: Path) -> None:
    """What the branch held when a file was uploaded does not say what it holds when the commit is made."""
    merged = merge("ada/adapter", tmp_path / "merged").output
    push(merged, "ada/new")
    (merged / "LICENSE").write_text("mine")
    theirs = {"config.json": b"{}", "tokenizer.json": b"{}", "model-00001-of-00003.safetensors": b"theirs"}
    hosted.fault(Fault("POST", "/preupload/", skip=1, before=lambda: hosted.commit("ada/new", theirs)))
    push(merged, "ada/new")
    for name in theirs:
        assert hosted.read("ada/new", name) == (merged / name).read_bytes()


@pytest.mark.parametrize("way", ["push", "stream"])
@pytest.mark.parametrize("options", [[], ["--revision", "v1"], ["--create-pr"]], ids=["main", "branch", "pull"])
def test_a_commit_whose_answer_is_lost(
    way: str, options: list[str], hosted: LoopbackHub, arguments: Callable[[str], list[str]]
) -> None:
    command = [*arguments(way), *options, "--json"]
    hosted.fault(Fault("POST", "/commit/", lost=True))
    found = run(command)
    branch = {"": "main", "--revision": "v1", "--create-pr": "refs/pr/1"}[options[0] if options else ""]
    assert hosted.commits("ada/new", branch)[1:] == ["initial commit"]
    assert hosted.head("ada/new", branch) in found.stdout
    assert f'"pr_url": "{hosted.endpoint}/ada/new/discussions/1"' in found.stdout or "--create-pr" not in options
    if options:
        assert untouched(hosted)


def test_a_lost_answer_and_an_older_pull_request(hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    """One with the same title and other files is not taken for this one."""
    command = [*arguments("push"), "--create-pr", "--commit-message", "Mine"]
    run(command)
    hosted.commit("ada/new", {"config.json": b"{}"}, branch="refs/pr/1")
    hosted.fault(Fault("POST", "/commit/", status=502))
    assert "discussions/2" in run(command).stdout
    hosted.fault(Fault("POST", "/commit/", status=502))
    assert "discussions/2" in run(command).stdout


def test_an_upload_that_stalls_is_sent_again(
    hosted: LoopbackHub, arguments: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fossil_export.publishing._target.STALL", 0.5)
    hosted.fault(stall := Fault("PUT", "/storage/", before=lambda: time.sleep(2)))
    run(arguments("push"))
    sent = [seen.path for seen in hosted.log if seen.method == "PUT"]
    assert stall.times == 0 and len(sent) == len(set(sent)) + 1 and whole(hosted)
