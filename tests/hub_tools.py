"""What the tests of the Hub have in common."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import ADA
from huggingface_hub import __version__, constants
from loopback import LoopbackHub, point_client_at

from fossil_export.cli import main

CLIENT = tuple(map(int, __version__.split(".")[:2]))
"""The version of the Hub's client."""
HTTPX: Any = import_module("requests" if CLIENT < (1,) else "httpx" if CLIENT < (2,) else "httpx2")
"""The library that it speaks HTTP with."""
KEEPS_READ_TOKEN = CLIENT >= (1, 29)
"""Whether it asks for the token to a repository's Xet storage once, not for every file."""

PART = "model-00001-of-00003.safetensors"
OFFLINE = "is not, or not wholly, in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or fetch the model first"

QUICK = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from fossil_export.cli import main
main()
"""
# The command, waiting for nothing.


def cli(*arguments: str | Path, code: int = 0) -> Result:
    """The command, run in this process; its exit code must be `code`."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.stderr or result.exception
    return result


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "fossil_export.json").read_text())
    return found


def fetched(hub: LoopbackHub) -> set[str]:
    """Names of the files of which bytes were asked for."""
    return {seen.path.split("/resolve/")[1].partition("/")[2] for seen in hub.log if "/resolve/" in seen.path}


def offline(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def nobody_there(hub: LoopbackHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(hub, "endpoint", "http://127.0.0.1:9")
    point_client_at(patch, hub, Path(constants.HF_HOME), ADA)
