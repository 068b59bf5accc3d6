"""What `push` or a streamed merge published is looked at; what the Hub says against it is told."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import push_fault_tools
import pytest
from conftest import ADA, BOB
from loopback import Fault, LoopbackHub
from push_fault_tools import ENDPOINTS, run, untouched, whole

from fossil_export import FossilExportError, merge, merge_to_hub, push

no_pauses = push_fault_tools.no_pauses
arguments = push_fault_tools.arguments


@pytest.mark.parametrize("way", ["push", "stream"])
def test_what_is_published_is_looked_at(way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    """The Hub takes the commit, and then lists something else."""
    other = [{"type": "file", "path": "config.json", "oid": "0" * 40, "size": 1}]
    wrong = Fault("GET", "/api/models/ada/new/tree/", status=200, body=other)
    hosted.fault(Fault("POST", "/api/models/ada/new/commit/", times=None, after=lambda: hosted.fault(wrong)))
    told = run(arguments(way), 1).stderr
    assert re.search(r"^error: ada/new: .* is not what was uploaded; run the same command again", told)
    assert wrong.times == 0


@pytest.mark.parametrize("way", ["push", "stream"])
def test_damaged_uploads(way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    command = arguments(way)
    hosted.fault(Fault("PUT", "/storage/", corrupt=True, times=None))
    line = run(command, 1).stderr
    assert re.search(r"ada/new: uploading .*: arrived damaged twice; run", line) and untouched(hosted)
    hosted.clear_faults()
    fault = Fault("PUT", "/storage/", corrupt=True)
    hosted.fault(fault)
    run(command)
    assert fault.times == 0 and whole(hosted)


@pytest.mark.parametrize("way", ["push", "stream"])
def test_what_the_hub_would_leave_out(way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    command = arguments(way)
    names = ["tokenizer.json", *(name for name in hosted.files("ada/base") if name.endswith(".safetensors"))]
    answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": True} for name in names]}
    hosted.fault(Fault("POST", "/preupload/", status=200, body=answer, times=None))
    if way == "push":  # all in one request
        listed = [*hosted.files("ada/base"), "fossil_export.json"]
        answer["files"] = [
            {"path": name, "uploadMode": "regular", "shouldIgnore": name == "tokenizer.json"} for name in listed
        ]
    line = run(command, 1).stderr
    assert "its .gitignore leaves out" in line and "change it" in line and untouched(hosted)


@pytest.mark.parametrize("way", ["push", "stream"])
def test_metadata_that_the_hub_does_not_take(
    way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]], recwarn: pytest.WarningsRecorder
) -> None:
    """It is told before anything is sent; a warning of the Hub's is one of ours."""
    command = arguments(way)
    hosted.reset_log()
    told = [{"message": '"license" must be one of [mit]'}, {"message": '"tags" is too long'}]
    hosted.fault(Fault(*ENDPOINTS["yaml"], status=400, body={"errors": told, "warnings": []}))
    line = run(command, 1).stderr
    assert 'the Hub refuses README.md\'s metadata: "license" must be one of [mit]; "tags" is too long; corr' in line
    assert untouched(hosted) and not any(seen.method == "PUT" for seen in hosted.log)
    hosted.fault(Fault(*ENDPOINTS["yaml"], status=200, body={"errors": [], "warnings": told}, times=2))
    done = run(command)
    assert done.stderr.count('warning: the Hub says of README.md\'s metadata: "license"') == 1 and whole(hosted)
    assert not [one for one in recwarn if "metadata" in str(one.message)]


def test_errors_of_single_files_are_told(hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    command = arguments("stream")
    error = {"code": 403, "message": "Storage quota of ada is exceeded"}
    body = {"objects": [{"oid": "0" * 64, "size": 1, "error": error}]}
    hosted.fault(Fault("POST", "/objects/batch", status=200, body=body, times=None))
    assert "Storage quota of ada is exceeded" in run(command, 1).stderr and untouched(hosted)


def test_a_card_that_cannot_be_fetched_is_not_lost(hosted: LoopbackHub, arguments: Callable[[str], list[str]]) -> None:
    """Neither written anew, nor replaced by an older one of the cache."""
    command = arguments("push")
    hosted.create("ada/new")
    for words in ("Older words.", "New words."):
        hosted.commit("ada/new", {"README.md": f"# A\n{words}\n".encode()})
        if words == "Older words.":
            run(command)
            continue
        head = hosted.head("ada/new")
        hosted.fault(Fault("HEAD", "/resolve/.*/README.md", status=500, times=None))
        hosted.fault(Fault("GET", "/resolve/.*/README.md", status=500, times=None))
        assert "reading README.md: the Hub has trouble" in run(command, 1).stderr and hosted.head("ada/new") == head
        hosted.clear_faults()
        run(command)
        assert b"New words." in hosted.read("ada/new", "README.md")


def test_the_bases_card_is_asked_for_more_than_once(hosted: LoopbackHub, tmp_path: Path) -> None:
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
    merged = merge("ada/adapter", tmp_path / "merged").output
    hosted.fault(Fault("HEAD", "/ada/base/resolve/.*/README.md", status=500, times=3))
    push(merged, "ada/new")
    assert b"license: mit" in hosted.read("ada/new", "README.md")
    hosted.fault(Fault(None, "/ada/base/resolve/.*/README.md", status=403, times=None))
    hosted.commit("ada/base", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    merged = merge("ada/adapter", tmp_path / "again").output
    (said, *_) = push(merged, "ada/other").warnings
    assert said.startswith("the base's card was not read: ada/base: your token may not do that")


@pytest.mark.parametrize("way", ["push", "stream"])
def test_no_log_holds_a_token(
    way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        command = arguments(way)
        for name in ("put", "batch", "commit"):
            hosted.fault(Fault(*ENDPOINTS[name], status=500, times=2))
        run(command)
        hosted.fault(Fault(*ENDPOINTS["commit"], status=403))
        hosted.commit("ada/new", {"config.json": b"{}"})
        run(command, 1)
    assert "/commit/" in caplog.text and ADA not in caplog.text and BOB not in caplog.text


def test_only_a_new_name_hides_what_was_there(hosted: LoopbackHub, tmp_path: Path) -> None:
    """A token that may read and not write makes nothing, and is told so."""
    merged = merge("ada/adapter", tmp_path / "merged").output
    hosted.create("bob/model")
    cache = tmp_path / "cache"
    for attempt in (
        lambda: push(merged, "bob/model"),
        lambda: merge_to_hub("ada/adapter", "bob/model", cache_dir=cache),
    ):
        with pytest.raises(FossilExportError, match=r"bob/model: .*your token may not do that"):
            attempt()
    assert untouched(hosted, "bob/model") and "bob/model" in hosted.repos()
