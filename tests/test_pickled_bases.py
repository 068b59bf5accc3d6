"""Bases in PyTorch's own files, against the same bases as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pickled_bases import merged_as, pickled_base, plain_base, read_all, write_state
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fossil_export
from fossil_export.merging import plan_merge


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_base(tmp_path_factory.mktemp("base") / "plain")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("files", [1, 3])
def test_a_merge_is_that_into_the_same_base_as_safetensors(
    files: int, zipped: bool, plain: Path, tmp_path: Path
) -> None:
    base = pickled_base(plain, tmp_path / "pickled", files, zipped)
    merged = merged_as(base, plain, tmp_path)
    names = {path.name for path in merged.iterdir() if "model" in path.name}
    wanted = {"model.safetensors"}
    if files > 1:
        wanted = {f"model-0000{number}-of-0000{files}.safetensors" for number in range(1, files + 1)}
        wanted.add("model.safetensors.index.json")
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == wanted - {"model.safetensors.index.json"}
    assert names == wanted
    with safe_open(merged / min(wanted), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=base, level="weights")
    assert verdict.parity, verdict.problems
    record = json.loads((merged / "fossil_export.json").read_text())
    assert {entry["file"] for entry in record["base"]["weights"]} == {
        path.name for path in base.iterdir() if path.suffix == ".bin"
    }


def test_verify_runs_the_trainer_on_a_pickled_base(plain: Path, tmp_path: Path) -> None:
    base = pickled_base(plain, tmp_path / "pickled")
    merged = merged_as(base, plain, tmp_path)
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=base)
    assert verdict.parity, verdict.problems
