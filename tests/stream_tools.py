"""The bases on the Hub, and what a streamed merge published or asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub


@pytest.fixture
def scene(hub: LoopbackHub, bases: Path) -> LoopbackHub:
    """The Hub with bases and adapters, under ada's name."""
    for name in ("many", "one", "tied", "qv"):
        hub.add_folder(f"ada/{name}", bases / name)
    hub.create("ada/nested")
    hub.commit("ada/nested", {f"sub/dir/{path.name}": path for path in (bases / "many").iterdir()})
    hub.commit("ada/nested", {"model.safetensors": b"another", "config.json": b"{}"})
    hub.reset_log()
    return hub


def published(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, tuple[int, str]]:
    kept = hub.files(repo, revision)
    return {name: kept[name] for name in kept if name not in (".gitattributes", "README.md")}


def card(hub: LoopbackHub, repo: str, revision: str = "main") -> str:
    return hub.read(repo, "README.md", revision).decode().replace(repo, "REPO").replace(repo.split("/")[1], "NAME")


def asked(hub: LoopbackHub, base: str, revision: str = "main") -> set[str]:
    """Names of the base's weights of which content was fetched or sent whole: a header is a request of a range."""
    names = {digest: name for name, (_, digest) in hub.files(base, revision).items() if name.endswith(".safetensors")}
    whole = [seen for seen in hub.log if seen.method in ("GET", "PUT") and seen.status == 200]
    return {name for digest, name in names.items() if any(digest in seen.path for seen in whole)}


CASES: dict[str, dict[str, Any]] = {
    "qv": {"adapter": "qv", "base": "ada/many", "ways": {"change", "copy"}},
    "linear": {"adapter": "linear", "base": "ada/many", "ways": {"change", "copy"}},
    "one file": {"adapter": "linear", "base": "ada/one", "ways": {"change"}},
    "mini": {"adapter": "mini", "base": "ada/many", "ways": {"change", "copy"}},
    "bat": {"adapter": "bat", "base": "ada/many", "ways": {"change", "copy"}},
    "bfloat16": {"adapter": "qv", "base": "ada/many", "dtype": "bfloat16", "ways": {"write"}},
    "cut anew": {"adapter": "qv", "base": "ada/many", "max_shard_size": "50KB", "ways": {"write"}},
    "into one": {"adapter": "qv", "base": "ada/many", "max_shard_size": "1GB", "ways": {"write"}},
    "trained head": {"adapter": "head", "base": "ada/tied", "ways": {"change", "copy", "write"}},
    "own tokenizer": {"adapter": "saved", "base": "ada/many", "ways": {"change", "copy"}},
    "subfolder": {"adapter": "qv", "base": "hf://ada/nested/sub/dir", "ways": {"change", "copy"}},
    "by file": {"adapter": "qv", "base": "hf://ada/one/model.safetensors", "ways": {"change"}},
    "local": {"adapter": "qv", "base": "many", "ways": {"write", "send"}},
    "local, one": {"adapter": "linear", "base": "one", "ways": {"write"}},
}
