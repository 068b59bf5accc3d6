"""The Hub's Xet storage, which is what its client uses wherever the repository has it: the real hf_xet in processes of
their own, against a Hub whose storage is a folder (see loopback/xet.py)."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADA, BOB, edit_json, make_adapter, make_base
from hub_tools import KEEPS_READ_TOKEN, QUICK
from loopback import Fault, LoopbackHub, environment

from fossil_export.storage.hub._errors import errno_of, explained, is_transient

FIRST, SECOND, UNTOUCHED = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three files and an adapter that does not touch the last."""
    folder = tmp_path_factory.mktemp("xet")
    make_base(folder / "base", shards="100KB")
    make_adapter(folder / "qv", folder / "base", target_modules=["q_proj", "v_proj"])
    edit_json(folder / "qv" / "adapter_config.json", base_model_name_or_path="ada/base")
    return folder


@pytest.fixture
def hub(tmp_path: Path, folders: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "storage", {ADA: "ada", BOB: "bob"}, xet=True) as running:
        for name in ("base", "qv"):
            running.add_folder(f"ada/{name}", folders / name)
        yield running
        assert running.incidents == []


class Command:
    """`fossil-export` in processes of their own, which share a home, as ada."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        # hf_xet repeats what fails for up to six minutes by itself.
        self.settings = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0", "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        self.hub.reset_log()
        return subprocess.Popen(
            [sys.executable, "-c", QUICK, *map(str, arguments)],
            env=environment(self.hub, self.folder / "home", ADA) | self.settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
        with self.start(*arguments) as process:
            out, told = process.communicate(timeout=120)
        assert process.returncode == code, told
        return out, told

    def stream(self, repo: str = "ada/streamed", *more: str | Path) -> dict[str, Any]:
        out, _ = self(*self.stream_arguments(repo), *more)
        found: dict[str, Any] = json.loads(out)
        return found

    def stream_arguments(self, repo: str = "ada/streamed") -> tuple[str | Path, ...]:
        cache = self.folder / "cache"
        return "merge", "ada/qv", "--push-to-hub", repo, "--stream", "--cache-dir", cache, "--json"

    def refused(self, *arguments: str | Path) -> str:
        """The one line of an error."""
        out, told = self(*arguments, code=1)
        assert out == "" and told.startswith("error: ") and told.count("\n") == 1 and ADA not in told
        return told.strip()


@pytest.fixture
def command(hub: LoopbackHub, tmp_path: Path) -> Command:
    return Command(hub, tmp_path)


def without_card(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, tuple[int, str]]:
    return {name: entry for name, entry in hub.files(repo, revision).items() if name != "README.md"}


def tokens(hub: LoopbackHub, right: str) -> list[str]:
    """Repositories to whose storage the client asked to be let."""
    asked = (seen.path.split("/") for seen in hub.log if f"/xet-{right}-token/" in seen.path)
    return ["/".join(parts[3:5]) for parts in asked]


def whole(hub: LoopbackHub) -> list[str]:
    """Large files that went over plain HTTP."""
    return [seen.path for seen in hub.log if seen.path.startswith(("/cdn/", "/storage/")) and seen.status == 200]


def test_the_same_over_xet(hub: LoopbackHub, command: Command, folders: Path, tmp_path: Path) -> None:
    """Merged by ids, pushed and streamed; nothing large goes over plain HTTP, and the untouched file nowhere."""
    command("merge", folders / "qv", "--base", folders / "base", "--output", tmp_path / "here")
    assert whole(hub) == tokens(hub, "read") == []
    command("merge", "ada/qv", "--output", tmp_path / "merged")
    assert whole(hub) == [] and set(tokens(hub, "read")) == {"ada/qv", "ada/base"}
    for path in sorted((tmp_path / "here").glob("*.safetensors")):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
    command("push", tmp_path / "merged", "ada/pushed")
    assert whole(hub) == [] and tokens(hub, "write") == ["ada/pushed"]
    for name in (FIRST, SECOND, UNTOUCHED):
        assert hub.read("ada/pushed", name) == (tmp_path / "here" / name).read_bytes()

    command.folder = tmp_path / "another"
    result = command.stream()
    assert whole(hub) == [] and tokens(hub, "write") == ["ada/streamed"] * 2
    assert result["copied"] == [UNTOUCHED] and not list((tmp_path / "another" / "cache" / "stream").iterdir())
    assert without_card(hub, "ada/streamed") == without_card(hub, "ada/pushed")
    assert hub.commits("ada/streamed")[1:] == ["initial commit"]
    again = command.stream()
    assert not again["changed"] and tokens(hub, "read") == ["ada/base"] * (1 if KEEPS_READ_TOKEN else 2)


def test_a_pull_request(hub: LoopbackHub, command: Command, folders: Path) -> None:
    """Into a repository that one may not write to."""
    hub.create("bob/model")
    command("push", folders / "qv", "bob/model", "--create-pr")
    adapter = "adapter_model.safetensors"
    assert hub.read("bob/model", adapter, "refs/pr/1") == (folders / "qv" / adapter).read_bytes()
    assert set(hub.files("bob/model")) == {".gitattributes"} and tokens(hub, "write") == ["bob/model"]


@pytest.mark.parametrize("remembered", [True, False])
def test_killed(remembered: bool, hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """SIGKILL as the second file is to be sent; the next run need not send the first again, unless the Hub lost it."""
    on_the_way = threading.Event()
    hub.fault(Fault(path="/xet-write-token/", skip=1, before=on_the_way.set, trickle=(1, 1.0)))
    with command.start(*command.stream_arguments()) as process:
        assert on_the_way.wait(60)
        process.send_signal(signal.SIGKILL)
    assert set(hub.files("ada/streamed")) == {".gitattributes"}
    hub.clear_faults()
    if not remembered:
        lost = [path for path in hub.xet_store.shards() if path not in hub.xet_store.given]
        assert len(lost) == 1
        hub.xet_store.forget(*lost)
    result = command.stream()
    assert result["resumed"] == int(remembered) and len(tokens(hub, "write")) == 2 - int(remembered)
    assert hub.commits("ada/streamed")[1:] == ["initial commit"]
    command("merge", "ada/qv", "--output", tmp_path / "merged")
    for name in (FIRST, SECOND, UNTOUCHED):
        assert hub.read("ada/streamed", name) == (tmp_path / "merged" / name).read_bytes()


LOG_IN = "log in with `hf auth login`"
TROUBLE: dict[str, tuple[dict[str, Any], str]] = {
    "unauthorized": ({"status": 401}, LOG_IN),
    "forbidden": ({"status": 403}, "your token may not do that"),
    "too many": ({"status": 429, "times": None}, "the Hub asks for fewer requests"),
    "broken": ({"status": 500, "times": None}, "the Hub has trouble of its own (status 500)"),
    "cut": ({"cut_after": 3, "times": None}, "cannot be reached ("),
}


@pytest.mark.parametrize("right", ["read", "write"])
@pytest.mark.parametrize("name", TROUBLE)
def test_a_refusal_is_one_line(name: str, right: str, hub: LoopbackHub, command: Command, folders: Path) -> None:
    fault, said = TROUBLE[name]
    hub.fault(Fault(path=f"/xet-{right}-token/", **fault))
    if right == "read":
        line = command.refused("merge", "ada/qv", "--base", folders / "base", "--output", command.folder / "merged")
        assert line.startswith("error: ada/qv: ") and not (command.folder / "merged").exists()
    else:
        line = command.refused("push", folders / "qv", "ada/new")
        assert line.startswith("error: ada/new: uploading adapter_config.json, adapter_model.safetensors: ")
        assert set(hub.files("ada/new")) == {".gitattributes"}
    assert said in line
    hub.clear_faults()
    command("push", folders / "qv", "ada/new")
    assert "adapter_model.safetensors" in hub.files("ada/new")


def test_passing_trouble_is_waited_for(hub: LoopbackHub, command: Command, folders: Path) -> None:
    hub.fault(Fault(path="/xet-write-token/", status=503))
    command("push", folders / "qv", "ada/new")
    assert len(tokens(hub, "write")) == 2


@pytest.mark.parametrize("right", ["read", "write"])
def test_storage_that_is_gone(right: str, hub: LoopbackHub, command: Command, folders: Path) -> None:
    hub.xet_store.url = "http://127.0.0.1:9"
    if right == "read":
        line = command.refused("merge", "ada/qv", "--output", command.folder / "merged")
    else:
        line = command.refused("push", folders / "qv", "ada/new")
    assert "the Xet storage cannot be reached (" in line and "http://127.0.0.1:9/" in line
    # hf_xet has its own patience; ours would multiply it.
    assert len(tokens(hub, right)) <= 2


def test_damaged_storage(hub: LoopbackHub, command: Command, folders: Path) -> None:
    """hf_xet hands over damaged bytes without a word; they are held against the SHA-256 that the Hub lists."""
    arguments = ("merge", "ada/qv", "--base", folders / "base", "--output", command.folder / "merged")
    (xorb,) = [path for path in hub.xet_store.xorbs() if path.stat().st_size < 10_000]
    sound = xorb.read_bytes()
    xorb.chmod(0o600)
    xorb.write_bytes(sound[: len(sound) // 2] + bytes([sound[len(sound) // 2] ^ 1]) + sound[len(sound) // 2 + 1 :])
    line = command.refused(*arguments)
    assert "adapter_model.safetensors came with other bytes than the Hub lists" in line
    xorb.write_bytes(sound)
    command(*arguments)
    xorb.unlink()
    command.folder = command.folder / "another"
    line = command.refused(*arguments[:-1], command.folder / "merged")
    assert "not found" in line and line.endswith("or with HF_HUB_DISABLE_XET=1 to go without hf_xet")


def test_no_more_on_the_disk_than_planned(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Counted at every request: what was fetched and merged, and hf_xet's own files."""
    peak = 0

    def size(path: Path) -> int:
        notes = {"logs", "trees", ".locks"} & set(path.parts) or path.suffix in (".lock", ".refs")
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            return 0 if notes or path.is_symlink() or path.is_dir() else path.stat().st_size
        return 0

    def look() -> None:
        nonlocal peak
        folders = (tmp_path / "home", tmp_path / "cache", *hub.xet_store.of_client())
        peak = max(peak, sum(size(path) for folder in folders for path in folder.rglob("*")))

    hub.fault(Fault(before=look, times=None))
    planned = command.stream("ada/streamed", "--dry-run")["stream"]["disk"]
    command.stream("ada/streamed", "--max-disk", f"{planned}B")
    largest = max(size for size, _ in hub.files("ada/base").values())
    assert largest < peak <= planned < largest + 25_000  # an adapter, small files, an index


NO_ANSWER = "error sending request for url (http://a/?sig=1)"
# fmt: off
RAISED: list[tuple[BaseException, bool, str]] = [
    (RuntimeError(f"Task error: CAS Client Error: Request middleware error: {NO_ANSWER}"), True, "cannot be reached"),
    (ConnectionError(f"Network error: Request middleware error: {NO_ANSWER}"), True, "cannot be reached"),
    (TimeoutError("Timeout: after 300 s"), True, "cannot be reached"),
    (RuntimeError("Task error: HTTP status client error (403 Forbidden), domain: http://a"), True,
     "the Xet storage refuses this (status 403), not the Hub itself"),
    (ConnectionError("Network error: Request error: HTTP status client error (403 Forbidden), domain: "
                     "http://a/api/models/ada/new/xet-write-token/main"), False, "may not do that"),
    (ConnectionError("Rate limited: HTTP status client error (429 Too Many Requests)"), True, "fewer requests"),
    (ConnectionError("Server error: HTTP status server error (503 Service Unavailable)"), True, "(status 503)"),
    (RuntimeError("Task error: IO Error: No space left on device (os error 28)"), False, "no room left on the disk"),
    (OSError("I/O error: I/O error: No space left on device (os error 28)"), False, "no room left on the disk"),
    (RuntimeError("Data integrity error: hash mismatch"), False, "hash mismatch; run the same command again, or with"),
    (RuntimeError("of another program"), False, "of another program; check HF_ENDPOINT"),
]
# fmt: on
# Texts as hf_xet 1.8.0 raised them here, and as xet-core's error.rs writes those that could not be brought about.


@pytest.mark.parametrize(("problem", "passes", "said"), RAISED, ids=[str(row[0])[:30] for row in RAISED])
def test_what_hf_xet_raises(problem: BaseException, passes: bool, said: str) -> None:
    line = str(explained(problem, "ada/model", "fetching x"))
    assert line.startswith("ada/model: fetching x: ") and said in line and "sig=" not in line and "\n" not in line
    assert is_transient(problem) == passes
    assert errno_of(problem) == (errno.ENOSPC if "os error 28" in str(problem) else None)


def test_no_log_holds_a_token(hub: LoopbackHub, command: Command) -> None:
    command.stream()
    logs = list((command.folder / "home" / "xet" / "logs").glob("*.log"))
    assert logs and not any(ADA.encode() in path.read_bytes() for path in logs)
