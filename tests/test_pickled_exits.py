"""What else is done with a base in PyTorch's own files: inspect, convert, export, push."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pickled_bases import pickled_base, plain_base, write_state
from quantized_bases import adapter_for
from safetensors.torch import load_file

import fossil_export
from fossil_export.cli import main


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("scene")
    plain_base(work / "plain", "float32")
    adapter_for(work / "plain", work / "adapter")
    pickled_base(work / "plain", work / "base")
    return work


def test_inspect(scene: Path) -> None:
    found = []
    for base in ("plain", "base"):
        done = CliRunner().invoke(main, ["inspect", str(scene / "adapter"), "--base", str(scene / base), "--json"])
        assert done.exit_code == 0, done.output
        found.append(done.output.replace(str(scene / "plain"), "BASE").replace(str(scene / "base"), "BASE"))
    assert found[0] == found[1]


def test_convert(scene: Path, tmp_path: Path) -> None:
    for base in ("plain", "base"):
        fossil_export.convert(scene / "adapter", tmp_path / base, to="lora", base=str(scene / base), rank=2)
    states = [load_file(tmp_path / base / "adapter_model.safetensors") for base in ("plain", "base")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_onnx(scene: Path, tmp_path: Path) -> None:
    result = fossil_export.export_onnx(
        scene / "adapter", tmp_path / "graph", base=scene / "base", runtime="torch", mode="merged"
    )
    assert result.targets == 14


def test_a_record_tells_one_base_from_another(scene: Path, tmp_path: Path) -> None:
    fossil_export.merge(scene / "adapter", tmp_path / "merged", base=scene / "base", hash=True)
    other = shutil.copytree(scene / "base", tmp_path / "other")
    state = load_file(scene / "plain" / "model.safetensors")
    write_state(other, {name: value.clone() for name, value in reversed(state.items())})
    verdict = fossil_export.verify(tmp_path / "merged", adapter=scene / "adapter", base=other, level="weights")
    assert any("another base" in problem for problem in verdict.problems)
    (weights,) = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())["base"]["weights"]
    assert weights["file"] == "pytorch_model.bin" and len(weights["sha256"]) == len(weights["header_sha256"]) == 64
