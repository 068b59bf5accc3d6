"""The loopback Hub with a model on it, and what the client is asked to do there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ADA, BOB
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from loopback import LoopbackHub, point_client_at

WEIGHTS = os.urandom(3_000_000)
FILES = {"config.json": b'{"a": 1}', "README.md": b"---\nlicense: mit\n---\nHello", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "storage", {ADA: "ada", BOB: "bob"}, multipart_above=4_000_000) as hub:
        yield hub
        assert hub.incidents == []  # the server did not fail, and no token came to the storage host


@pytest.fixture
def api(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    point_client_at(monkeypatch, hub, tmp_path / "home", ADA)
    return HfApi()


@pytest.fixture
def source(hub: LoopbackHub) -> str:
    hub.create("bob/base")
    hub.commit("bob/base", FILES, "Add files")
    return "bob/base"


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def add(api: HfApi, repo_id: str, files: dict[str, bytes], **how: object) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message="Add", **how).oid)  # type: ignore[arg-type]


def read_range(repo_id: str, path: str, first: int, last: int) -> bytes:
    headers = build_hf_headers() | {"Range": f"bytes={first}-{last}"}
    answer = http_backoff("GET", hf_hub_url(repo_id, path), headers=headers, follow_redirects=True)
    hf_raise_for_status(answer)
    assert answer.status_code == 206
    return bytes(answer.content)
