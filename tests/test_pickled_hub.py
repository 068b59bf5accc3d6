"""Bases on the Hub that have their weights in PyTorch's own files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import stream_tools
import torch
from conftest import weights
from loopback import LoopbackHub
from pickled_bases import write_state
from stream_tools import published

from fossil_export import merge, merge_to_hub, push
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.merging import plan_merge

scene = stream_tools.scene


def pickled(bases: Path, folder: Path, files: int, zipped: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((bases / "many" / "config.json").read_bytes())
    state = {name: value.clone() for name, value in weights(bases / "many").items()}
    state = {
        name: value.T.contiguous().T if value.ndim == 2 and "up" in name else value for name, value in state.items()
    }
    write_state(folder, state, files, zipped)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("files", [1, 3])
def test_a_base_is_planned_by_ranges_and_merged(
    files: int, zipped: bool, scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    folder = pickled(bases, tmp_path / "pickled", files, zipped)
    scene.add_folder("ada/pickled", folder)
    scene.reset_log()
    plan = plan_merge(bases / "qv", "ada/pickled")
    ranges = [seen for seen in scene.log if seen.method == "GET" and seen.status == 206]
    assert files <= len(ranges) <= 8 * files  # however many tensors there are
    here = open_checkpoint(folder)
    for one, other in zip(plan.base.files, here.files, strict=True):
        assert one.encoded == other.encoded and one.size == other.size
        assert [_place(info) for info in one.tensors] == [_place(info) for info in other.tensors]
    merge(bases / "qv", tmp_path / "merged", base="ada/pickled")
    merge(bases / "qv", tmp_path / "wanted", base="ada/many")
    found, wanted = weights(tmp_path / "merged"), weights(tmp_path / "wanted")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def _place(info: object) -> object:
    coding = getattr(info, "coding", None)
    return (info.name, info.dtype, info.shape, coding.elements.offset if coding else info.offset)  # type: ignore[attr-defined]


def test_a_streamed_merge_publishes_what_a_push_does(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    scene.add_folder("ada/pickled", pickled(bases, tmp_path / "pickled", 3, True))
    result = merge_to_hub(bases / "qv", "ada/streamed", base="ada/pickled", cache_dir=tmp_path / "cache")
    assert {move.way for move in result.plan.moves} == {"write"}
    push(merge(bases / "qv", tmp_path / "merged", base="ada/pickled").output, "ada/pushed")
    assert published(scene, "ada/streamed") == published(scene, "ada/pushed")
    assert not any(name.endswith(".bin") for name in published(scene, "ada/streamed"))
