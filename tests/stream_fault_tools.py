"""A streamed merge that is disturbed, and what is on the Hub afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loopback import Fault, LoopbackHub

from fossil_export import FossilExportError, StreamResult, merge, merge_to_hub

EXPECTED: dict[str, tuple[int, str]] = {}


@pytest.fixture
def scene(hub: LoopbackHub, parts: Path, tmp_path: Path) -> LoopbackHub:
    """Base and adapter on the Hub. In EXPECTED is what an undisturbed merge publishes: commits there go by content."""
    hub.add_folder("ada/base", parts / "base")
    hub.add_folder("ada/qv", parts / "qv")
    if not EXPECTED:
        merged = merge(parts / "qv", tmp_path / "merged", base=parts / "base").output
        merge_to_hub("ada/qv", "ada/expected", cache_dir=tmp_path / "other")
        EXPECTED.update(without_card(hub, "ada/expected"))
        for path in weights(merged):
            assert hub.read("ada/expected", path.name) == path.read_bytes()
        hub.reset_log()
    return hub


def without_card(hub: LoopbackHub, repo: str) -> dict[str, tuple[int, str]]:
    return {name: entry for name, entry in hub.files(repo).items() if name != "README.md"}


def stream(tmp_path: Path, repo: str = "ada/new", **options: Any) -> StreamResult:
    return merge_to_hub("ada/qv", repo, cache_dir=tmp_path / "cache", **options)


def failing(tmp_path: Path, match: str, **options: Any) -> str:
    with pytest.raises(FossilExportError, match=match) as raised:
        stream(tmp_path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    assert without_card(hub, repo) == EXPECTED
    return len(hub.commits(repo)) == 2


def nothing(hub: LoopbackHub, repo: str = "ada/new") -> bool:
    return set(hub.files(repo)) == {".gitattributes"}


def stored(hub: LoopbackHub) -> list[str]:
    """SHA-256 of what was uploaded, in order."""
    return [seen.path.split("/")[4] for seen in hub.log if seen.method == "PUT" and seen.status == 200]


def fetched(hub: LoopbackHub) -> list[str]:
    """Names of the base's files that were fetched whole."""
    names = {digest: name for name, (_, digest) in hub.files("ada/base").items()}
    whole = [seen for seen in hub.log if seen.method == "GET" and seen.path.startswith("/cdn/") and seen.status == 200]
    return [names[seen.path.split("/")[2]] for seen in whole if seen.path.split("/")[2] in names]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


FIRST, SECOND, FOURTH = (f"model-0000{number}-of-00007.safetensors" for number in (1, 2, 4))


def interrupted(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A merge that has all but the commit; returns its journal."""
    hub.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "3 of 3 files are uploaded")
    hub.reset_log()
    (journal,) = tmp_path.glob("cache/stream/*/journal.json")
    return journal
