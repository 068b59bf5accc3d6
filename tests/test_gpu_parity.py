"""The GPU benchmark, tried on the CPU: it finishes, it covers every case, and its check can fail."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_parity
import pytest
import torch
from gpu_parity import Difference, LayerRow, compare, verdict

GOOD = LayerRow("q, o", "tile", 64, "bfloat16", errors=((1e-3, 1e-3),), devices=Difference(0, 100, 0))


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, gpu_parity.__file__, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_variant_and_dtype_is_the_model_that_was_trained(tmp_path: Path) -> None:
    document, figures = tmp_path / "gpu.md", tmp_path / "gpu.json"
    done = run(
        "--device", "cpu", "--small", "--steps", "3", "--lr", "3e-3", "--output", str(document), "--json", str(figures)
    )
    assert done.returncode == 0, done.stderr
    assert document.read_text() + "\n" == done.stdout
    assert "Every row is within its bounds." in done.stdout
    record = json.loads(figures.read_text())
    assert record["problems"] == []
    cases = set(itertools.product(("tile", "ragged", "mini", "bat"), gpu_parity.DTYPES))
    graphs = record["onnx"]  # four modes for the variants that are branches, two for bat, two layers, no bfloat16
    assert len(graphs) == (3 * 4 + 2) * 2 * 2 and all(row["swapped_out"] is not False for row in graphs)
    assert sum(row["swapped_out"] is True for row in graphs) == 3 * 2  # not float16
    for part, layers in (("layers", 4), ("models", 1)):
        rows = record[part]
        assert len(rows) == layers * len(cases)
        assert {(row["variant"], row["dtype"]) for row in rows} == cases
        for row in rows:
            assert not row["diverged"]
            assert row["devices"]["total"] > 0
            assert row["variant"] == "bat" or row["devices"]["elements"] == 0
    assert all(row["losses"][1] < row["losses"][0] for row in record["models"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_a_gpu_it_says_so_and_does_not_take_the_cpu() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "--device cpu --small" in done.stderr


def test_a_good_row_passes() -> None:
    assert verdict([GOOD, replace(GOOD, variant="bat", devices=Difference(3, 100, 1))]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"errors": ((1e-3, 1e-2),)}, "merged error is 0.01"),
        ({"errors": ((1e-3, 1e-3), (1e-3, float("inf")))}, "merged error is inf"),
        ({"errors": ((0.0, 3e-5),)}, "merged error is 3e-05"),
        ({"devices": Difference(1, 100, 1)}, "CPU and device differ in 1 of 100"),
    ],
)
def test_the_check_can_fail(change: dict[str, object], words: str) -> None:
    (problem,) = verdict([GOOD, replace(GOOD, **change)])
    assert problem.startswith("q, o, tile r=64, bfloat16: ")
    assert words in problem


def test_differences_are_counted_in_steps_across_zero() -> None:
    weight = gpu_parity.stored(torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.bfloat16))
    other = gpu_parity.stored(torch.tensor([1.0, -1.0078125, -0.0, 2.03125], dtype=torch.bfloat16))
    assert compare(weight, weight) == Difference(0, 4, 0)
    assert compare(weight, other) == Difference(3, 4, 2)
