"""A Hub that misbehaves while `push` or a streamed merge writes to it: everything appears once, or nothing does."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import ADA, BOB
from loopback_hub import Fault, LoopbackHub, Request

from fossil_export import FossilExportError, merge, merge_to_hub, push
from fossil_export.cli import main

Publish = Callable[..., Any]

WRITING = {
    "info": ("GET", "^/api/models/ada/new$"),
    "create": ("POST", "^/api/repos/create$"),
    "tree": ("GET", "^/api/models/ada/new/tree/"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch$"),
    "put": ("PUT", "^/storage/"),
    "verify": ("POST", "/lfs/verify$"),
    "yaml": ("POST", "^/api/validate-yaml$"),
    "commit": ("POST", "/commit/"),
}
COPYING = {
    "paths": ("POST", "/paths-info/"),
    "duplicate": ("POST", "/lfs-files/duplicate$"),
    "resolve": (None, "^/ada/base/resolve/"),
    "cdn": ("GET", "^/cdn/"),
}
ENDPOINTS = WRITING | COPYING
CASES = [
    *(("push", name) for name in ("create", "preupload", "put", "commit")),
    *(("stream", name) for name in ENDPOINTS),
]


@pytest.fixture(autouse=True)
def no_pauses(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fossil_export.storage.hub.errors.PAUSE", 0.0)


@pytest.fixture
def arguments(hosted: LoopbackHub, tmp_path: Path) -> Callable[[str], list[str]]:
    """The command that publishes as ada/new: `push` of a merged model, or a streamed merge."""

    def build(way: str) -> list[str]:
        if way == "stream":
            cache = str(tmp_path / "cache")
            adapter = "hf://ada/adapter/checkpoint-100"  # touches one of the base's files
            return ["merge", adapter, "--push-to-hub", "ada/new", "--stream", "--cache-dir", cache]
        merge("hf://ada/adapter/checkpoint-100", tmp_path / "merged")
        return ["push", str(tmp_path / "merged"), "ada/new"]

    return build


def run(arguments: list[str], code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.stderr or result.exception
    assert "hf_" not in result.output and "signature=" not in result.output
    if code:
        assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result


def puts(hub: LoopbackHub) -> list[Request]:
    return [seen for seen in hub.log if seen.method == "PUT" and seen.status == 200]


def untouched(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    return repo not in hub.repos() or set(hub.files(repo)) == {".gitattributes"}


def whole(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    """One commit that holds the merged model."""
    return len(hub.commits(repo)) == 2 and {
        "config.json", "model.safetensors.index.json", "README.md", "fossil_export.json", "tokenizer.json",
    } < set(hub.files(repo))  # fmt: skip


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
        (429, "asks for fewer requests; wait a few minutes"),
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
    monkeypatch.setattr("fossil_export.publishing.target.STALL", 0.5)
    hosted.fault(stall := Fault("PUT", "/storage/", before=lambda: time.sleep(2)))
    run(arguments("push"))
    sent = [seen.path for seen in hosted.log if seen.method == "PUT"]
    assert stall.times == 0 and len(sent) == len(set(sent)) + 1 and whole(hosted)


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
