"""The GPU benchmark, tried on the CPU: a whole run covers every case, and one that was killed goes on."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gpu_parity
import pytest
from gpu.cases import DTYPES, PRODUCTS, cases, row_of, small_setup
from gpu_tools import BARE, SMALL, entries, findings, run


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
    found = set(itertools.product(("tile", "ragged", "mini", "bat", "lora", "dora"), DTYPES))
    exported = record["onnx"]  # four modes for the variants that are branches, two for bat, one for DoRA
    assert len(exported) == (4 * 4 + 2 + 1) * 2 * 2 and all(row["swapped_out"] is not False for row in exported)
    assert sum(row["swapped_out"] is True for row in exported) == 4 * 2  # not float16
    for part, count in (("layers", 4), ("models", 1)):
        rows = record[part]
        assert len(rows) == count * len(found)
        assert {(row["variant"], row["dtype"]) for row in rows} == found
        for row in rows:
            assert not row["diverged"]
            assert row["devices"]["total"] > 0
            assert row["variant"] in PRODUCTS or row["devices"]["elements"] == 0
    assert all(row["losses"][1] < row["losses"][0] for row in record["models"])


def test_what_is_left_out_is_said_before_the_first_row_and_in_the_report(whole: Path) -> None:
    lines = (whole / "stderr").read_text().splitlines()
    said = next(number for number, line in enumerate(lines) if line.startswith("left out: onnx, bfloat16: onnxruntime"))
    assert said < next(number for number, line in enumerate(lines) if line.startswith("[1/"))
    assert lines[said].removeprefix("left out: ") in (whole / "gpu.md").read_text()
    assert json.loads((whole / "gpu.json").read_text())["missing"] == ["onnx, bfloat16: 38 rows"]


def test_files_are_few_and_none_stay(whole: Path) -> None:
    assert list((whole / "work").iterdir()) == []
    found = entries(whole / "gpu.jsonl")
    for entry in (entry for entry in found if entry["case"]["part"] == "models"):
        case, nbytes = entry["case"], entry["row"]["nbytes"]
        timed = case["dtype"] == "bfloat16" and case["variant"] in ("tile", "bat", "lora")  # three times on both
        models = (6 if timed else 2) + (case["variant"] == "tile")  # the first writes the base
        assert models * nbytes < entry["written"] < (models + 0.5) * nbytes  # and an adapter
        assert 3 * nbytes < entry["peak"] < 3.5 * nbytes  # base, CPU's, device's
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


def test_rows_come_back_from_the_journal_as_they_were(whole: Path) -> None:
    for entry in entries(whole / "gpu.jsonl"):
        row = row_of(entry["case"]["part"], entry["row"])
        assert json.loads(json.dumps(asdict(row))) == entry["row"]
        assert isinstance(hash(row), int)  # tuples throughout, as in a row that was just found
