"""The GPU benchmark starts anywhere, and says what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gpu_parity
import pytest
import torch
from gpu import graphs, preflight
from gpu.cases import DTYPES
from gpu_tools import BARE, QUICK, ROOT, SMALL, entries, here, run


def test_it_starts_from_a_plain_checkout_in_any_folder(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "fossil_export", checkout / "fossil_export")
    shutil.copytree(ROOT / "benchmarks", checkout / "benchmarks")
    (checkout / "fossil_export" / "version.py").write_text('__version__ = "of this checkout"\n')
    elsewhere.mkdir()
    done = run(*QUICK, script=checkout / "benchmarks" / "gpu_parity.py", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "fossil-export of this checkout" in done.stderr
    assert len(entries(elsewhere / "gpu_parity.jsonl")) == 24


def test_missing_packages_are_named_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", gpu_parity.__file__], capture_output=True, text=True, timeout=60, env=BARE
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("not installed: numpy, ") and "peft" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_a_gpu_it_says_so_and_does_not_take_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert here() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "--device cpu --small" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_a_cuda_provider_that_is_only_listed_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    part = preflight.onnx_part("cuda", DTYPES)
    assert part.dtypes == ()
    (line,) = part.left_out
    assert "its CUDA provider does not start" in line and "README" in line
    monkeypatch.setattr(graphs.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    (line,) = preflight.onnx_part("cuda", DTYPES).left_out
    assert "has no CUDA provider" in line and "README" in line


def test_without_onnx_ir_the_other_parts_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    options = (*SMALL, "--dtypes", "float32", "--journal", tmp_path / "gpu.jsonl", "--parts")
    assert here(*options, "layers", "onnx") == 0
    captured = capsys.readouterr()
    assert "left out: onnx: onnx_ir cannot be imported (ModuleNotFoundError" in captured.err
    assert "Not run." in captured.out and "onnx_ir cannot be imported" in captured.out
    assert here(*options, "onnx") == 1
    assert "nothing is left to run" in capsys.readouterr().err
