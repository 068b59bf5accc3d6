"""The verdict of the GPU benchmark can fail; differences and files are counted rightly."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu.cases import Difference, LayerRow, verdict
from gpu.tools import Scratch, compare, compare_folders, stored

GOOD = LayerRow("q, o", "tile", 64, "bfloat16", errors=((1e-3, 1e-3),), devices=Difference(0, 100, 0))


def test_a_good_row_passes() -> None:
    assert verdict([GOOD, replace(GOOD, variant="bat", devices=Difference(3, 100, 1))]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"errors": ((1e-3, 1e-2),)}, "merged error is 0.01"),
        ({"errors": ((1e-3, 1e-3), (1e-3, float("inf")))}, "merged error is inf"),
        ({"errors": ((0.0, 3e-5),)}, "merged error is 3e-05"),
        ({"devices": Difference(1, 100, 1)}, "CPU and device differ in 1 of 100"),
        ({"failed": "OSError: no room"}, "failed: OSError: no room"),
    ],
)
def test_the_check_can_fail(change: dict[str, object], words: str) -> None:
    (problem,) = verdict([GOOD, replace(GOOD, **change)])
    assert problem.startswith("q, o, tile r=64, bfloat16: ")
    assert words in problem


def test_differences_are_counted_in_steps_across_zero() -> None:
    weight = stored(torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.bfloat16))
    other = stored(torch.tensor([1.0, -1.0078125, -0.0, 2.03125], dtype=torch.bfloat16))
    assert compare(weight, weight) == Difference(0, 4, 0)
    assert compare(weight, other) == Difference(3, 4, 2)


def test_folders_are_compared_to_the_bit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value in (("one", 1.0), ("two", 1.0078125)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.tensor([1.0, value], dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    assert compare_folders(tmp_path / "one", tmp_path / "one", "bfloat16") == Difference(0, 2, 0)
    assert compare_folders(tmp_path / "one", tmp_path / "two", "bfloat16") == Difference(1, 2, 1)
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "two" / "other.safetensors")
    with pytest.raises(ValueError, match="same weights files"):
        compare_folders(tmp_path / "one", tmp_path / "two", "bfloat16")


def test_what_is_written_is_counted_once(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    (scratch.empty("one") / "a").write_bytes(b"x" * 100)
    scratch.note()
    os.link(tmp_path / "one" / "a", scratch.empty("two") / "a")
    scratch.note()
    assert (scratch.written, scratch.peak) == (100, 100)
    (scratch.empty("one") / "a").write_bytes(b"x" * 50)
    scratch.note()
    scratch.drop("one", "two")
    scratch.note()
    assert (scratch.written, scratch.peak) == (150, 150)
