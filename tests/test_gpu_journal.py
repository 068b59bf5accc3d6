"""The journal of the GPU benchmark: a run that was cut goes on; another run's journal is refused."""

from __future__ import annotations

import fcntl
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu import layers, main, preflight
from gpu.cases import LayerRow
from gpu_tools import QUICK, SMALL, entries, findings, here


def test_it_stops_before_its_time_is_up_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*QUICK, "--journal", tmp_path / "gpu.jsonl")
    for count in (1, 2):
        assert here(*options, "--seconds", "0") == main.CUT
        captured = capsys.readouterr()
        assert f"{24 - count} rows are left: the same command goes on" in captured.err
        assert f"not run: layers, float32: {24 - count} rows" in captured.out
        assert len(entries(tmp_path / "gpu.jsonl")) == count
    assert here(*options) == 0
    assert len(findings(tmp_path / "gpu.jsonl")) == len(entries(tmp_path / "gpu.jsonl")) == 24


def test_an_error_is_its_row_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*QUICK, "--journal", tmp_path / "gpu.jsonl")
    compute = layers.Layers.row

    def row(self: layers.Layers, case: Any) -> LayerRow:
        if (case.variant, case.layer) == ("mini", "down"):
            raise MemoryError("out of memory\nand more")
        return compute(self, case)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Layers, "row", row)
        assert here(*options) == 1
    captured = capsys.readouterr()
    line = "down 128×192, mini r=16, float32: failed: MemoryError: out of memory"
    assert f"- {line}\n" in captured.out and line in captured.err and "FAILED" in captured.out
    assert len(entries(tmp_path / "gpu.jsonl")) == 24
    assert here(*options) == 0
    assert "23 of 24 rows are in" in capsys.readouterr().err
    assert len(entries(tmp_path / "gpu.jsonl")) == 25


def test_a_run_that_is_ended_leaves_its_rows_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = layers.Layers.row
    (tmp_path / "work").mkdir()

    def row(self: layers.Layers, case: Any) -> LayerRow:
        if case.variant == "ragged":
            assert list((tmp_path / "work").iterdir()) != []
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, case)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(layers.Layers, "row", row)
    with pytest.raises(SystemExit) as ending:
        here(*QUICK, "--journal", tmp_path / "gpu.jsonl", "--work", tmp_path / "work")
    assert ending.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(entries(tmp_path / "gpu.jsonl")) == 4
    assert list((tmp_path / "work").iterdir()) == []


def test_a_journal_of_another_setup_is_refused_or_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "gpu.jsonl"
    options = (*QUICK, "--journal", journal, "--seconds", "0")
    here(*options)
    before = journal.read_bytes()
    assert here(*options, "--lr", "1e-2") == main.REFUSED
    assert "rate 0.003 there, 0.01 here" in capsys.readouterr().err
    assert journal.read_bytes() == before
    assert here(*options, "--lr", "1e-2", "--fresh") == main.CUT
    assert len(entries(journal)) == 1 and journal.read_bytes() != before


def test_a_journal_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*SMALL, "--journal", tmp_path / "gpu.jsonl", "--seconds", "0", "--dtypes", "float32", "--parts")
    assert here(*options, "onnx") == main.CUT
    part = preflight.onnx_part
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "onnx_part", lambda *a: replace(part(*a), versions={"onnxruntime": "0.1"}))
        assert here(*options, "onnx") == main.REFUSED
        assert "onnxruntime " in (told := capsys.readouterr().err) and "0.1 here" in told
    assert here(*options, "layers") == main.CUT  # which depends on no ONNX Runtime
    monkeypatch.setattr(preflight.peft, "__version__", "0.0")
    assert here(*options, "layers") == main.REFUSED
    assert "PEFT" in (told := capsys.readouterr().err) and "0.0 here" in told


@pytest.mark.parametrize("harm", ["notes\n", "{}\n", '["gpu_parity"]\n', "notes"])
def test_a_file_that_is_no_journal_is_kept(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text(harm)
    assert here(*QUICK, "--journal", tmp_path / "notes", "--fresh") == main.REFUSED
    assert "is no journal" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == harm


def test_a_damaged_journal_is_refused_and_a_held_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "gpu.jsonl"
    options = (*QUICK, "--journal", journal, "--seconds", "0")
    here(*options)
    with journal.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert here(*options) == main.REFUSED
        assert "another run" in capsys.readouterr().err
        file.write('{"case": {"part": "mod\n')
    assert here(*options) == main.REFUSED
    assert "line 3 is damaged" in capsys.readouterr().err
