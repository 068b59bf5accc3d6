"""Trouble with the Hub that passes, changes the bytes, or lasts while there is a copy in the cache."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ADA, NOISE, interruptible, weights
from hub_tools import OFFLINE, PART, QUICK, cli, content, fetched, nobody_there, offline, record
from huggingface_hub import constants
from loopback import Fault, Handler, LoopbackHub, environment
from safetensors.torch import save_file

from fossil_export import load_adapter, merge, plan_merge
from fossil_export.errors import HubError


@pytest.fixture(scope="session")
def wanted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What every merge of ada/adapter gives, but for its record."""
    folder = tmp_path_factory.mktemp("wanted") / "merged"
    merge(models / "adapter", folder, base=models / "base")
    return {name: value for name, value in content(folder).items() if name != "fossil_export.json"}


def merged(folder: Path, *options: str) -> dict[str, bytes]:
    """What the command makes, without a word on stderr."""
    assert cli("merge", "ada/adapter", "-o", folder, *options).stderr == ""
    return {name: value for name, value in content(folder).items() if name != "fossil_export.json"}


def blobs_are_sound(home: Path) -> bool:
    """Whether every file in the cache is what its name says."""
    blobs = [path for path in home.rglob("blobs/*") if path.is_file()]
    for path in blobs:
        value = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()
        if path.name not in (git, hashlib.sha256(value).hexdigest()):
            return False
    return bool(blobs)


def cdn(hub: LoopbackHub, name: str, repo: str = "ada/base") -> str:
    """Where the storage host has a file."""
    return f"/cdn/{hub.files(repo)[name][1]}"


# Trouble that passes

PASSING: dict[str, tuple[str, str, int]] = {
    "info": ("GET", "^/api/models/ada/base$", 0),
    "tree": ("GET", "^/api/models/ada/base/tree/", 0),
    "head": ("HEAD", "ada/base/resolve/.*config.json", 0),
    "redirected head": ("HEAD", "/resolve-cache/.*ada/base/.*config.json", 0),
    "get": ("GET", "/resolve-cache/.*ada/base/.*config.json", 0),
    "range": ("GET", f"ada/base/resolve/.*{PART}", 0),
    "range of storage": ("GET", "/cdn/PART", 0),
    "storage": ("GET", "/cdn/PART", 1),
}
KINDS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "lost": {"lost": True},
    "cut": {"cut_after": 20},
    "reset": {"cut_after": 20, "reset": True},
}
BODILESS = ("head", "redirected head", "range")
# The range is of a large file: a redirection to the storage host.


@pytest.mark.parametrize(
    "where, how",
    [(where, how) for where in PASSING for how in KINDS if how not in ("cut", "reset") or where not in BODILESS],
)
def test_passing_trouble_changes_nothing(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, where: str, how: str
) -> None:
    method, path, skip = PASSING[where]
    fault = Fault(method, path.replace("/cdn/PART", cdn(hosted, PART)), skip=skip, times=2, **KINDS[how])
    hosted.fault(fault)
    assert merged(tmp_path / "merged") == wanted
    assert fault.times == 0 and blobs_are_sound(tmp_path / "home")


def test_the_pause_that_the_hub_asks_for_is_made(hosted: LoopbackHub) -> None:
    hosted.fault(Fault("GET", "^/api/models/ada/adapter$", status=429, headers={"Retry-After": "1"}))
    started = time.monotonic()
    assert load_adapter("ada/adapter").rank == 8 and time.monotonic() - started > 1
    hosted.fault(Fault("GET", "^/api/models/ada/adapter$", status=429, headers={"Retry-After": "3600"}, times=None))
    with pytest.raises(
        HubError, match=r"fewer requests, and for a pause of 60 minutes; run the same command after \d\d:\d\d"
    ):
        load_adapter("ada/adapter")


def test_a_slow_hub_is_waited_for(hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    hosted.fault(Fault(path="ada/|cdn", trickle=(20_000, 0.01), times=None))
    assert merged(tmp_path / "merged") == wanted


def test_a_hub_that_stalls_is_asked_again(hosted: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DEFAULT_REQUEST_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    plan = plan_merge("ada/adapter", f"ada/base@{hosted.head('ada/base')}")
    faults = [
        Fault("GET", path, before=lambda: time.sleep(0.5)) for path in ("^/api/models/ada/base$", f"resolve/.*{PART}")
    ]
    for fault in faults:
        hosted.fault(fault)
    assert plan_merge("ada/adapter").files == plan.files and [fault.times for fault in faults] == [0, 0]


def test_a_passing_error_does_not_give_an_old_commit(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """The Hub's client falls back to its cache, silently, where one request fails."""
    merge("ada/adapter", tmp_path / "first")
    config = json.loads((models / "base" / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    last = hosted.commit("ada/base", {"config.json": json.dumps(config).encode()})
    hosted.fault(fault := Fault("GET", "^/api/models/ada/base$", status=500))
    merge("ada/adapter", tmp_path / "second")
    assert fault.times == 0 and record(tmp_path / "second")["base"]["revision"] == last
    assert json.loads((tmp_path / "second" / "config.json").read_text())["rms_norm_eps"] == 0.5


@pytest.mark.parametrize("name", [PART, "config.json", "adapter_model.safetensors"])
def test_a_damaged_download_is_refused_and_forgotten(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    repo = "ada/adapter" if name.startswith("adapter") else "ada/base"
    fault = Fault(
        "GET", cdn(hosted, name, repo) if name.endswith("s") else f"/resolve-cache/.*{repo}/.*{name}", corrupt=True
    )
    fault.skip = 2 * name.endswith("s")  # the first two are for the header
    hosted.fault(fault)
    result = cli("merge", "ada/adapter", "-o", tmp_path / "merged", code=1)
    assert (
        result.stderr == f"error: {repo}: {name} came with other bytes than the Hub lists; run the same command again\n"
    )
    assert fault.times == 0 and not (tmp_path / "merged").exists()
    assert blobs_are_sound(tmp_path / "home")
    assert not [path for path in (tmp_path / "home").rglob(name) if path.exists() or path.is_symlink()]
    assert merged(tmp_path / "merged") == wanted


def test_a_damaged_header_does_not_decide_the_merge(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """Ranges have no hash; the file has, and must begin with the header that was planned with."""
    shutil.copytree(models / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*", *NOISE))
    path = tmp_path / "base" / "model.safetensors"
    save_file(weights(models / "base"), path, {"format": "pt", "long": "x" * 100_000})
    hosted.add_folder("ada/long", tmp_path / "base")
    hosted.fault(fault := Fault("GET", cdn(hosted, path.name, "ada/long"), corrupt=True, skip=1))
    result = cli("merge", "ada/adapter", "--base", "ada/long", "-o", tmp_path / "merged", code=1)
    assert result.stderr.startswith("error: ada/long: model.safetensors came with other bytes") and fault.times == 0
    assert not (tmp_path / "merged").exists()
    merge("ada/adapter", tmp_path / "merged", base="ada/long")
    merge(models / "adapter", tmp_path / "here", base=tmp_path / "base")
    assert content(tmp_path / "merged")["model.safetensors"] == content(tmp_path / "here")["model.safetensors"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_does_not_wait_for_downloads(kind: signal.Signals, hosted: LoopbackHub, tmp_path: Path) -> None:
    started = threading.Event()
    hosted.fault(Fault("GET", cdn(hosted, PART), skip=2, before=started.set, trickle=(100, 1.0), times=None))
    command = ["merge", "ada/adapter", "-o", str(tmp_path / "merged")]
    with interruptible():
        child = subprocess.Popen(
            [sys.executable, "-m", "fossil_export", *command],
            env=environment(hosted, tmp_path / "home of child", ADA),
            stderr=subprocess.PIPE,
            text=True,
        )
    with child as process:
        assert started.wait(60)
        process.send_signal(kind)
        _, told = process.communicate(timeout=60)  # the download would take minutes
    assert process.returncode == 128 + kind
    assert told.strip() == ("Aborted!" if kind == signal.SIGINT else "") and not list(tmp_path.glob("*merged*"))


# Without a connection


def test_offline_after_a_merge(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(tmp_path / "first")
    offline(hosted, monkeypatch, tmp_path)
    hosted.reset_log()
    assert merged(tmp_path / "second") == wanted and hosted.log == []
    assert content(tmp_path / "first") == content(tmp_path / "second")
    commit = hosted.head("ada/adapter")
    assert load_adapter(f"ada/adapter@{commit}").revision == load_adapter("ada/adapter").revision == commit
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    assert "parity" in cli("verify", tmp_path / "third", "--level", "weights").stdout
    assert cli("inspect", "hf://ada/adapter/checkpoint-100", code=1).stderr == (f"error: ada/adapter: {OFFLINE}\n")


@pytest.mark.parametrize("missing", [PART, "tokenizer.json", "config.json"])
def test_a_cache_that_lacks_a_file_is_not_taken_for_the_model(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    merged(tmp_path / "first")
    (path,) = (tmp_path / "home" / "hub" / "models--ada--base" / "snapshots").rglob(missing)
    path.unlink()
    offline(hosted, monkeypatch, tmp_path)
    result = cli("merge", "ada/adapter", "-o", tmp_path / "second", code=1)
    assert result.stderr.startswith(f"error: ada/base: {OFFLINE}") and not (tmp_path / "second").exists()


def test_a_cache_of_another_program(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(tmp_path / "first")
    shutil.rmtree(tmp_path / "home" / "hub" / "models--ada--base" / "trees")
    offline(hosted, monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    result = cli("merge", "ada/adapter", "-o", tmp_path / "second")
    assert result.stderr == (
        "warning: ada/base: is taken as it lies in the Hub's cache, where nothing tells whether that is all of it\n"
    )
    assert {name: content(tmp_path / "second")[name] for name in wanted} == wanted


def test_a_hub_that_is_gone(
    hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(tmp_path / "first")
    commits = {repo: hosted.head(f"ada/{repo}")[:12] for repo in ("adapter", "base")}
    plan = plan_merge("ada/adapter")
    nobody_there(hosted, monkeypatch, tmp_path)
    result = cli("merge", "ada/adapter", "-o", tmp_path / "second")
    assert result.stderr.splitlines() == [
        f"warning: ada/{repo}: the copy in the Hub's cache is taken, of commit {commit}, since http://127.0.0.1:9 "
        "cannot be reached ([Errno 111] Connection refused)"
        for repo, commit in commits.items()
    ]
    assert content(tmp_path / "first") == content(tmp_path / "second") and plan.warnings == ()
    result = cli("merge", "ada/adapter", "--base", "ada/none", "-o", tmp_path / "third", code=1)
    assert result.stderr.startswith(
        "error: ada/none: no such file or folder here, and http://127.0.0.1:9 cannot be reached"
    )


# Proxies


def test_a_proxy(hosted: LoopbackHub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """The client asks the proxy for whole addresses, of a Hub whose name only the proxy knows."""
    asked: list[str] = []

    class Proxy(Handler):
        def do_GET(self) -> None:
            origin, self.path = re.fullmatch("(http://[^/]+)(/.*)", self.path).groups()  # type: ignore[union-attr]
            asked.append(origin)
            self.serve()

        do_HEAD = do_GET

    hosted.server.RequestHandlerClass = Proxy
    hosted._repos["ada/base"].private = True
    env = environment(hosted, tmp_path / "h", ADA) | {
        "HF_ENDPOINT": "http://hub.example",
        "HTTP_PROXY": hosted.endpoint,
    }
    del env["NO_PROXY"]
    command = [sys.executable, "-m", "fossil_export", "merge", "ada/adapter", "-o", str(tmp_path / "merged")]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {name: value for name, value in content(tmp_path / "merged").items() if name in wanted} == wanted
    assert set(asked) == {"http://hub.example", f"http://localhost:{hosted.port}"} and PART in fetched(hosted)

    env["HTTP_PROXY"] = "http://127.0.0.1:9"
    command[-1] = str(tmp_path / "other")
    ran = subprocess.run([command[0], "-c", QUICK, *command[3:]], env=env | {"HF_HOME": str(tmp_path / "h2")},
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 1 and ran.stderr == (
        "error: ada/adapter: no such file or folder here, and "
        "http://hub.example cannot be reached ([Errno 111] Connection refused); check the network, "
        "HTTPS_PROXY and HF_ENDPOINT, and run the same command again\n"
    )
