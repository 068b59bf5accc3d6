"""Commands that publish, and the requests of which one fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from loopback import LoopbackHub, Request

from fossil_export import merge
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
    monkeypatch.setattr("fossil_export.storage.hub._errors.PAUSE", 0.0)


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
