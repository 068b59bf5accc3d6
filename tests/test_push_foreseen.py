"""What would stop a publication is found out before the merge, not after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ADA
from hub_tools import cli, nobody_there, offline
from loopback import Fault, LoopbackHub

Setup = Callable[[LoopbackHub, pytest.MonkeyPatch, Path], Any]


def no_token(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("HF_TOKEN")


def wrong_token(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("HF_TOKEN", "hf_wrongwrong")


def reading_token(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.accounts.roles[ADA] = "read"


def there(**how: Any) -> Setup:
    def setup(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
        hub.create("bob/theirs", **how)

    return setup


def guest(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.accounts.members["lab"] = {"ada": "read"}


def adapter_there(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.create("ada/new")
    hub.commit("ada/new", {"adapter_config.json": b"{}"})


def failing(status: int) -> Setup:
    return lambda hub, patch, folder: hub.fault(Fault("GET", "^/api/models/ada/new", status=status, times=None))


def nothing(*_: Any) -> None:
    pass


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
CASES: list[tuple[Setup, str, str]] = [
    (offline, "ada/new", "ada/new: HF_HUB_OFFLINE is set; unset it to publish"),
    (nobody_there, "ada/new", "ada/new: looking for it: HUB cannot be reached ([Errno 111] Connection refused); "),
    (no_token, "ada/new", f"ada/new: asking for permission: the Hub wants to know who you are; {LOGIN}"),
    (wrong_token, "ada/new", "ada/new: looking for it: the Hub does not know this token; log in again"),
    (reading_token, "ada/new", "ada/new: your token may only read; take one with write access"),
    (nothing, "bob/new", "bob/new: is not there, and ada may not make it for bob; write ada/… or the name of a"),
    (guest, "lab/new", "lab/new: is not there, and ada may not make it for lab; write ada/… or the name of a"),
    (there(), "bob/theirs", "bob/theirs: asking for permission: your token may not do that; "),
    (there(private=True), "bob/theirs", "bob/theirs: is not there, and ada may not make it for bob"),
    (adapter_there, "ada/new", "ada/new: holds an adapter"),
    (nothing, "ada/base", "ada/base: is the base itself, and the next merge would be on top of this one"),
    (failing(500), "ada/new", "ada/new: looking for it: the Hub has trouble of its own (status 500)"),
    (failing(418), "ada/new", "ada/new: looking for it: the Hub refuses this (status 418)"),
]  # fmt: skip


LATER = ("holds an adapter", "is the base itself")
"""What a streamed merge finds out by itself, beside the writer (test_stream_faults.py, test_push_target.py)."""


@pytest.mark.parametrize(
    "setup, repo, message, stream",
    [
        (*case, stream)
        for case in CASES
        for stream in (False, True)
        if not (stream and any(one in case[2] for one in LATER))
    ],
)
def test_refused_before_the_merge(
    setup: Setup,
    repo: str,
    message: str,
    stream: bool,
    hosted: LoopbackHub,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = models / "base"
    if repo == "ada/base":
        base = Path(f"ada/base@{hosted.head('ada/base')}")
    setup(hosted, monkeypatch, tmp_path)
    monkeypatch.setattr("fossil_export.merging._run.Writer.__init__", _nothing_is_merged)
    monkeypatch.setattr("fossil_export.merging.run_merge", _nothing_is_merged)
    hosted.reset_log()
    where = ["--stream", "--cache-dir", tmp_path / "cache"] if stream else ["-o", tmp_path / "merged"]
    told = cli("merge", models / "adapter", "--base", base, "--push-to-hub", repo, *where, code=1).stderr
    assert told.replace(hosted.endpoint, "HUB").startswith(f"error: {message}"), told
    assert told.count("\n") == 1 and not (tmp_path / "merged").exists()
    assert not [seen for seen in hosted.log if seen.method in ("POST", "PUT")]


def _nothing_is_merged(*_: Any, **__: Any) -> None:
    raise AssertionError("the merge began")


def test_a_dry_run_asks_nobody(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(hosted, monkeypatch, tmp_path)
    for more in (["-o", tmp_path / "merged"], ["--stream"]):
        cli("merge", models / "adapter", "--base", models / "base", "--push-to-hub", "ada/new", *more, "--dry-run")


def test_an_organization_takes_models_of_its_members(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    hosted.accounts.members |= {"lab": {"ada": "write"}}
    hosted.accounts.roles[ADA] = "fineGrained"
    hosted.accounts.scopes[ADA] = ["lab"]
    cli("merge", "ada/adapter", "-o", tmp_path / "merged", "--push-to-hub", "lab/new")
    assert "config.json" in hosted.files("lab/new")
    told = cli("merge", "ada/adapter", "-o", tmp_path / "again", "--push-to-hub", "ada/new", code=1).stderr
    assert "your token may not do that" in told  # what such a token may do, the Hub does not tell in full


def test_a_certificate_in_a_pull_request_needs_a_login(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("merge", "ada/adapter", "-o", tmp_path / "merged", "--push-to-hub", "ada/new")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("fossil_export.verifying._verification.verify", _nothing_is_merged)
    told = cli("verify", "ada/new", "--push-to-hub", "--create-pr", code=1).stderr
    assert told.startswith("error: ada/new: opening the repository: the Hub wants to know who you are")
