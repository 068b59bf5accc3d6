"""`merge --stream`: only what must be moved is moved, and no more is on the disk than planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stream_tools
from conftest import CARD, make_adapter
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Fault, LoopbackHub
from stream_tools import CASES, asked, published

from fossil_export import FossilExportError, merge, merge_to_hub, plan_stream, push
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._run import Writer
from fossil_export.publishing._moves import _moves

scene = stream_tools.scene


def test_what_the_cache_has_is_not_fetched(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    cached = Path(snapshot_download("ada/many"))
    before = {path.name: path.read_bytes() for path in cached.iterdir()}
    scene.reset_log()
    merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert asked(scene, "ada/many") == set() and scene.moved()[0] < 50_000
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == before


def refuse(hub: LoopbackHub) -> None:
    hub.refuse_copies = True


def no_xet(hub: LoopbackHub) -> None:
    hub.no_xet = True


def forbid(hub: LoopbackHub) -> None:
    hub.fault(Fault("POST", "/lfs-files/duplicate", status=403, times=None))


@pytest.mark.parametrize("how", [refuse, no_xet, forbid])
def test_copies_that_the_hub_refuses(
    how: Callable[[LoopbackHub], None], scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    scene.commit("ada/many", {"tokenizer.json": b'{"long": "%s"}' % (b"x" * 11_000_000)})  # in storage, as weights are
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    how(scene)
    scene.reset_log()
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", hash=False)
    assert published(scene, "ada/new") == published(scene, "ada/pushed") and result.copied == ()
    (said,) = [line for line in result.push.warnings if "passed through" in line]
    assert "does not copy from ada/many to ada/new" in said and "5 untouched files" in said and "\n" not in said
    assert scene.commits("ada/new")[1:] == ["initial commit"] and not list((tmp_path / "cache").rglob("*.*"))


# The disk


def on_disk(*folders: Path) -> int:
    """Bytes of all that lies there, whole or in part, but for what programs note for themselves."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    notes = {"trees", "refs", ".locks", ".cache", "journal.json", "CACHEDIR.TAG"}
    journal = ".journal.json.partial-"
    return sum(p.stat().st_size for p in files if not notes & set(p.parts) and not p.name.startswith(journal))


@pytest.fixture
def peak(scene: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lay on the disk at every request and after every merge of a file."""
    found: list[int] = []

    def look(*_: object) -> None:
        found.append(on_disk(tmp_path / "cache", tmp_path / "home"))

    def looked_after(done: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = done(*arguments)
            look()
            return result

        return run

    for name in ("write", "change"):
        monkeypatch.setattr(Writer, name, looked_after(getattr(Writer, name)))
    scene.fault(Fault(after=look, times=None))
    return found


@pytest.mark.parametrize("name", ["qv", "cut anew", "into one", "bfloat16", "trained head"])
def test_no_more_on_the_disk_than_planned(
    name: str, scene: LoopbackHub, bases: Path, tmp_path: Path, peak: list[int]
) -> None:
    options = {key: value for key, value in CASES[name].items() if key != "ways"}
    base = options.pop("base")
    adapter = "ada/qv" if options.pop("adapter") == "qv" else bases / "head"
    plan = plan_stream(adapter, base, **options)
    peak.clear()
    merge_to_hub(adapter, "ada/new", base=base, cache_dir=tmp_path / "cache", max_disk=plan.disk, **options)
    # It is that much, of which the smallest files may come later, and no more.
    at_hand = max(move.disk for move in plan.moves)
    assert at_hand + plan.adapter_bytes <= max(peak) <= plan.disk < at_hand + plan.adapter_bytes + 10_000
    largest = max(file.size for file in plan.merge.files)
    assert plan.disk - plan.kept <= largest or name != "qv"
    with pytest.raises(FossilExportError, match=rf"--max-disk {plan.disk - 1:,} is too little.* allow {plan.disk:,}"):
        plan_stream(adapter, base, max_disk=plan.disk - 1, **options)


def test_what_comes_beside_weights_counts_too(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """A large tokenizer of the adapter's, and the base's card."""
    scene.commit("ada/qv", {"tokenizer.json": b" " * 3_000_000, "tokenizer_config.json": b"{}"})
    scene.commit("ada/many", {"README.md": CARD + b"x" * 2_000_000})
    plan = plan_stream("ada/qv", "ada/many")
    merge_to_hub("ada/qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", max_disk=plan.disk)
    left = [path for path in (tmp_path / "home").rglob("blobs/*") if path.is_file()]
    largest = max(move.disk for move in plan.moves)
    assert 5_000_000 < sum(path.stat().st_size for path in left) <= plan.disk - largest < 5_100_000


def test_too_little_disk_is_told_before_anything_moves(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match=r"--max-disk 1,000 is too little: model-.* caches 2,\d+; allow 39,"):
        merge_to_hub(bases / "qv", "ada/new", base="ada/many", max_disk="1KB", cache_dir=tmp_path / "cache")
    assert "ada/new" not in scene.repos() and not (tmp_path / "cache").exists() and not asked(scene, "ada/many")
    with pytest.raises(FossilExportError, match="max_disk is 'much', expected a size like 5GB"):
        plan_stream(bases / "qv", "ada/many", max_disk="much")


def test_a_limit_holds_when_copies_are_refused(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", bases / "many", target_modules=["k_proj"])
    plan = plan_stream(tmp_path / "adapter", "ada/many")
    copied = max(move.file.size for move in plan.moves if move.way == "copy") + plan.kept
    assert plan.disk < copied
    scene.refuse_copies = True
    options: dict[str, Any] = {"base": "ada/many", "cache_dir": tmp_path / "cache"}
    with pytest.raises(FossilExportError, match=rf"takes {copied:,} bytes at once; .* allow {copied:,} \(2 of 7"):
        merge_to_hub(tmp_path / "adapter", "ada/new", max_disk=plan.disk, **options)
    assert set(scene.files("ada/new")) == {".gitattributes"}
    scene.reset_log()
    result = merge_to_hub(tmp_path / "adapter", "ada/new", max_disk=copied, **options)
    assert result.resumed == 2 and asked(scene, "ada/many") == {m.file.name for m in plan.moves if m.way == "copy"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["copy", "change", "write"]), st.sets(st.integers(0, 7), max_size=4)), max_size=8
    ),
    st.lists(st.integers(1, 99), min_size=8, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_the_disk_is_accounted_for(wanted: list[tuple[str, set[int]]], sizes: list[int]) -> None:
    """Carry the plan out with names alone: what lies there is what the plan says, and everything is there in time."""
    size = {str(number): sizes[number] for number in range(8)}
    ways = []
    for number, (way, sources) in enumerate(wanted):
        names = (str(number),) if way == "change" else tuple(sorted(map(str, sources))) if way == "write" else ()
        ways.append((FilePlan(str(number), b"", (), sizes[number]), way, names))
    here: set[str] = set()
    for move in _moves(ways, size):
        missing = set(move.sources) - here
        assert move.fetch == sum(size[name] for name in missing)
        here |= missing
        here -= set(move.sources) if move.way == "change" else set()
        assert move.disk == sum(size[name] for name in here) + (
            move.file.size if move.way in ("change", "write") else 0
        )
        assert set(move.drop) <= here
        here -= set(move.drop)
    assert not here
