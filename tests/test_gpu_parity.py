"""The GPU benchmark, tried on the CPU: it starts anywhere, covers every case, its check can fail, and a run that was
cut goes on."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_parity
import pytest
import torch
from gpu import graphs, layers, main, preflight
from gpu.cases import DTYPES, Difference, LayerRow, cases, row_of, small_setup, verdict
from gpu.tools import Scratch, compare, compare_folders, stored

ROOT = Path(gpu_parity.__file__).parent.parent
SMALL = ("--device", "cpu", "--small", "--steps", "3", "--lr", "3e-3")
QUICK = (*SMALL, "--parts", "layers", "--dtypes", "float32")
GOOD = LayerRow("q, o", "tile", 64, "bfloat16", errors=((1e-3, 1e-3),), devices=Difference(0, 100, 0))
BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*options: object, script: Path = Path(gpu_parity.__file__), **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **{"env": BARE, **more})


def here(*options: object) -> int:
    return main.main("", 0.0, [str(option) for option in options])


def entries(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal after its first."""
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def findings(journal: Path) -> dict[str, dict[str, Any]]:
    """By case, the row without its timings."""
    return {str(e["case"]): e["row"] | {"speeds": (), "seconds": ()} for e in entries(journal)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run of everything wrote."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "work").mkdir()
    files = ("--output", folder / "gpu.md", "--json", folder / "gpu.json", "--work", folder / "work")
    done = run(*SMALL, *files)
    assert done.returncode == 0, done.stderr
    assert (folder / "gpu.md").read_text() + "\n" == done.stdout
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_every_variant_and_dtype_is_the_model_that_was_trained(whole: Path) -> None:
    assert "Every row is within its bounds." in (whole / "gpu.md").read_text()
    record = json.loads((whole / "gpu.json").read_text())
    assert record["problems"] == []
    found = set(itertools.product(("tile", "ragged", "mini", "bat"), DTYPES))
    exported = record["onnx"]  # four modes for the variants that are branches, two for bat, two layers, no bfloat16
    assert len(exported) == (3 * 4 + 2) * 2 * 2 and all(row["swapped_out"] is not False for row in exported)
    assert sum(row["swapped_out"] is True for row in exported) == 3 * 2  # not float16
    for part, count in (("layers", 4), ("models", 1)):
        rows = record[part]
        assert len(rows) == count * len(found)
        assert {(row["variant"], row["dtype"]) for row in rows} == found
        for row in rows:
            assert not row["diverged"]
            assert row["devices"]["total"] > 0
            assert row["variant"] == "bat" or row["devices"]["elements"] == 0
    assert all(row["losses"][1] < row["losses"][0] for row in record["models"])


def test_what_is_left_out_is_said_before_the_first_row_and_in_the_report(whole: Path) -> None:
    lines = (whole / "stderr").read_text().splitlines()
    said = next(number for number, line in enumerate(lines) if line.startswith("left out: onnx, bfloat16: onnxruntime"))
    assert said < next(number for number, line in enumerate(lines) if line.startswith("[1/"))
    assert lines[said].removeprefix("left out: ") in (whole / "gpu.md").read_text()
    assert json.loads((whole / "gpu.json").read_text())["missing"] == ["onnx, bfloat16: 28 rows"]


def test_files_are_few_and_none_stay(whole: Path) -> None:
    assert list((whole / "work").iterdir()) == []
    found = entries(whole / "gpu.jsonl")
    for entry in (entry for entry in found if entry["case"]["part"] == "models"):
        case, nbytes = entry["case"], entry["row"]["nbytes"]
        timed = case["dtype"] == "bfloat16" and case["variant"] in ("tile", "bat")  # three times on both devices
        models = (6 if timed else 2) + (case["variant"] == "tile")  # the first writes the base
        assert models * nbytes < entry["written"] < (models + 0.25) * nbytes  # and an adapter
        assert 3 * nbytes < entry["peak"] < 3.25 * nbytes  # base, CPU's, device's
    for entry in (entry for entry in found if entry["case"]["part"] == "onnx" and entry["case"]["mode"] == "tiled"):
        rows, columns = (128, 128) if entry["case"]["layer"] == "q, o" else (192, 128)
        assert 0 < entry["written"] < rows * columns * (2 if entry["case"]["dtype"] == "float16" else 4)  # no weight
    record = json.loads((whole / "gpu.json").read_text())
    assert record["written"] == sum(entry["written"] for entry in found)
    assert record["peak"] == max(entry["peak"] for entry in found)


def test_a_run_that_was_killed_goes_on(whole: Path, tmp_path: Path) -> None:
    journal, work = tmp_path / "gpu.jsonl", tmp_path / "work"
    work.mkdir()
    options = [*SMALL, "--dtypes", "float32", "--journal", journal, "--work", work]
    command = [sys.executable, gpu_parity.__file__, *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=BARE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "] models: model, ragged" in line:
                break
        process.kill()
    assert list(work.iterdir()) != []  # the base, which a killed run cannot remove
    before, count = entries(journal), len(cases(small_setup("cpu", 3, 3e-3), dtypes=["float32"]))
    assert 18 <= len(before) < count
    with journal.open("a") as file:
        file.write('{"case": {"part": "mod')  # a line that was cut
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of {count} rows are in {journal} already" in done.stderr
    assert sum(line.startswith("[") for line in done.stderr.splitlines()) == count - len(before)
    after = entries(journal)
    assert after[: len(before)] == before
    assert len(after) == len(findings(journal)) == count
    uncut = findings(whole / "gpu.jsonl")
    assert findings(journal) == {case: row for case, row in uncut.items() if row["dtype"] == "float32"}
    assert list(work.iterdir()) == []


def test_it_starts_from_a_plain_checkout_in_any_folder(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "fossil_export", checkout / "fossil_export")
    shutil.copytree(ROOT / "benchmarks", checkout / "benchmarks")
    (checkout / "fossil_export" / "version.py").write_text('__version__ = "of this checkout"\n')
    elsewhere.mkdir()
    done = run(*QUICK, script=checkout / "benchmarks" / "gpu_parity.py", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "fossil-export of this checkout" in done.stderr
    assert len(entries(elsewhere / "gpu_parity.jsonl")) == 16


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


def test_it_stops_before_its_time_is_up_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*QUICK, "--journal", tmp_path / "gpu.jsonl")
    for count in (1, 2):
        assert here(*options, "--seconds", "0") == main.CUT
        captured = capsys.readouterr()
        assert f"{16 - count} rows are left: the same command goes on" in captured.err
        assert f"not run: layers, float32: {16 - count} rows" in captured.out
        assert len(entries(tmp_path / "gpu.jsonl")) == count
    assert here(*options) == 0
    assert len(findings(tmp_path / "gpu.jsonl")) == len(entries(tmp_path / "gpu.jsonl")) == 16


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
    assert len(entries(tmp_path / "gpu.jsonl")) == 16
    assert here(*options) == 0
    assert "15 of 16 rows are in" in capsys.readouterr().err
    assert len(entries(tmp_path / "gpu.jsonl")) == 17


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


def test_rows_come_back_from_the_journal_as_they_were(whole: Path) -> None:
    for entry in entries(whole / "gpu.jsonl"):
        row = row_of(entry["case"]["part"], entry["row"])
        assert json.loads(json.dumps(asdict(row))) == entry["row"]
        assert isinstance(hash(row), int)  # tuples throughout, as in a row that was just found


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
