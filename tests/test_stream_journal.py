"""The journal of a streamed merge: of one merge, damaged, or forgotten by the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import stream_fault_tools
from huggingface_hub.lfs import UploadInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Fault, LoopbackHub
from stream_fault_tools import FIRST, FOURTH, SECOND, failing, fetched, interrupted, same, stored, stream

from fossil_export import plan_stream
from fossil_export.merging._survival import Survival
from fossil_export.publishing._journal import Journal
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._workplace import workplace

scene = stream_fault_tools.scene


def test_the_hub_forgot(scene: LoopbackHub, tmp_path: Path) -> None:
    """Uploads that no commit holds may be gone after a while; so may one of them."""
    journal = json.loads(interrupted(scene, tmp_path).read_text())
    del scene._repos["ada/new"].objects[journal[FIRST]["sha256"]]
    result = stream(tmp_path)
    assert same(scene) and result.resumed == 2 and fetched(scene) == [FIRST] and len(stored(scene)) == 1
    assert list(result.survival) == list(stream(tmp_path, repo="ada/other").survival)

    scene.create("ada/new")
    interrupted(scene, tmp_path)
    scene._repos["ada/new"].objects.clear()
    assert stream(tmp_path).resumed == 0 and same(scene)


def test_a_damaged_journal(scene: LoopbackHub, tmp_path: Path) -> None:
    path = interrupted(scene, tmp_path)
    text = path.read_text()
    assert len(Journal(path).done) == 3
    for damaged in (
        text[: len(text) // 2],
        "",
        "null",
        "[1, 2]",
        json.dumps({FIRST: {}}),
        text.replace('"sha256": "', '"sha256": "zz'),
        text.replace('"sample": "', '"sample": "!'),
        text.replace('"size": 37', '"size": 0.37'),
        text.replace('"size": 37', '"size": -37'),
        text.replace('"survival": {', '"survival": {"a": {"lost": 1}, '),
        text.replace('"survival": {', '"survival": {"a": {"kept": NaN}, '),
        text.replace('"survival": {', f'"survival": {{"a": {{"kept": {10**400}}}, '),
        "[" * 100_000,
        "\x00\xff" * 100,
    ):
        path.write_text(damaged)
        assert Journal(path).done == {}
    path.write_text(text[:-2])
    assert stream(tmp_path).resumed == 0 and same(scene)
    # What the Hub has is not sent again, whatever the journal says.
    assert fetched(scene) == [FIRST, SECOND, FOURTH] and stored(scene) == []


def test_a_journal_is_of_one_merge(scene: LoopbackHub, parts: Path, tmp_path: Path) -> None:
    """Another adapter, base, layout, dtype, branch or target does not take it up; the same one does."""
    interrupted(scene, tmp_path)
    scene.commit("ada/base", {"LICENSE": b"other"}, branch="v2")
    places = {workplace_of(tmp_path, "ada/qv")}
    for adapter, repo, base, options in [
        (parts / "k", {}, None, {}),
        ("ada/qv", {}, "ada/base@v2", {}),
        ("ada/qv", {}, parts / "base", {}),
        ("ada/qv", {}, None, {"dtype": "bfloat16"}),
        ("ada/qv", {}, None, {"max_shard_size": "60KB"}),
        ("ada/qv", {"repo_id": "ada/other"}, None, {}),
        ("ada/qv", {"revision": "v2"}, None, {}),
        ("ada/qv", {"create_pr": True}, None, {}),
    ]:
        place = workplace_of(tmp_path, adapter, repo, base, **options)
        assert place not in places
        places.add(place)
    (parts / "base" / FIRST).touch()
    assert workplace_of(tmp_path, "ada/qv", {}, parts / "base") not in places
    scene.fault(Fault("POST", "/commit/", status=403))
    failing(tmp_path, "3 of 3", revision="v3")
    scene.reset_log()
    assert stream(tmp_path, revision="main").resumed == 3 and same(scene) and stored(scene) == []


def workplace_of(
    tmp_path: Path, adapter: str | Path, repo: dict[str, Any] | None = None, base: Any = None, **options: Any
) -> Path:
    plan, repository = plan_stream(adapter, base, **options), Repository(**{"repo_id": "ada/new"} | (repo or {}))
    with workplace(plan, repository, tmp_path / "cache") as place:
        return place


@given(
    st.dictionaries(
        st.text(max_size=9),
        st.tuples(
            st.integers(0, 1 << 60),
            st.binary(min_size=32, max_size=32),
            st.binary(max_size=512),
            st.dictionaries(st.text(max_size=9), st.tuples(*[st.floats(allow_nan=False)] * 3), max_size=3),
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_journal_comes_back(done: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.json"
        journal = Journal(path)
        for name, (size, digest, sample, sums) in done.items():
            survival = {tensor: Survival(*values) for tensor, values in sums.items()}
            journal.add(name, UploadInfo(size, sample, digest), survival)
        again = Journal(path)
        assert again.done == journal.done and not list(path.parent.glob(".*"))
        for name, (size, digest, sample, sums) in done.items():
            assert again.survival(name) == {tensor: Survival(*values) for tensor, values in sums.items()}
            if name not in ("", ".") and "/" not in name and name != "..":
                upload = again.operation(name).upload_info
                assert (upload.size, upload.sha256, upload.sample) == (size, digest, sample)
        for cut in (1, 7, path.stat().st_size // 2) if path.exists() else ():
            path.write_bytes(path.read_bytes()[:-cut])
            assert Journal(path).done in ({}, again.done)
