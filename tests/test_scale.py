"""The model of what a merge costs (benchmarks/scale.py): its sums are those of a real merge, its tables can be made."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import common
import floor
import merge as merge_benchmark
import pytest
import scale
from scaling import bases, costs
from scaling.constants import Constants
from scaling.work import PARTS, RANGE, FileWork, planning_requests, work_of

from fossil_export import merge, plan_merge
from fossil_export.checkpoints._header import read_header

GB = 10**9
CONSTANTS = Constants({"lora-4 BF16": 1e-9, "tile-4 BF16": 1e-9, "a": 1e-9}, 0.0, 0.5, 200_000_000)


def tiny(name: str = "tiny") -> bases.Shape:
    """Two layers, in files of at most 30 kB."""
    shape = bases.llama(name, 64, 96, 2, 8, vocabulary=160)
    return bases.Shape(shape.name, shape.config, shape.linears, shape.others, limit=30_000)


def work(name: str, written: int, read: int = 0, **elements: int) -> FileWork:
    return FileWork(name, written, read or written, 0, 0, -(-(read or written) // RANGE), elements)


@pytest.mark.parametrize("method", ["lora", "tile"])
def test_bytes_of_a_real_merge_are_those_of_the_model(method: str, tmp_path: Path) -> None:
    shape = tiny()
    base = bases.write_base(tmp_path / "base", shape)
    adapter = bases.write_adapter(tmp_path / "adapter", shape, base, method, 4)
    found = work_of(plan_merge(adapter))
    merge(adapter, tmp_path / "merged")
    written = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert {one.name: one.written for one in found} == written and len(written) > 3

    stored = [read_header(file) for file in sorted(base.glob("*.safetensors"))]
    assert [one.read for one in found] == [sum(t.nbytes for t in header.tensors) for header in stored]
    trained = read_header(adapter / "adapter_model.safetensors")
    assert sum(one.trained for one in found) == sum(tensor.nbytes for tensor in trained.tensors)
    merged = sum(rows * columns for rows, columns in shape.linears.values())
    assert sum(sum(one.elements.values()) for one in found) == merged
    assert {kind for one in found for kind in one.elements} == {f"{method}-4 BF16"}
    assert sum(one.copied for one in found) + 2 * merged == sum(one.read for one in found)
    assert all(one.ranges == 3 for one in found), "a small file is read by one request, between two that look at it"


def test_codes_count_as_stored_and_as_computed(tmp_path: Path) -> None:
    deep = bases.deepseek("tiny", "deepseek_v3", 2, 1, 1, 1, 16, count=3)
    base = bases.write_base(tmp_path / "base", deep)
    adapter = bases.write_adapter(tmp_path / "adapter", deep, base, "lora", 4, bases.ATTENTION)
    plan = plan_merge(adapter)
    found = work_of(plan)
    attention = sum(rows * columns for name, (rows, columns) in deep.linears.items() if "self_attn" in name)
    every = sum(rows * columns for rows, columns in deep.linears.values())
    assert sum(one.elements.get("lora-4 F8_E4M3", 0) for one in found) == attention
    assert sum(one.elements.get("decode F8_E4M3", 0) for one in found) == every - attention
    assert sum(one.read for one in found) == sum(bases._nbytes(tensor) for tensor in deep.tensors())
    assert planning_requests(plan) == 2 * 3 + 5
    assert scale.planned("", "", adapter).tensors == len(list(deep.tensors())), "those that are stored"


def test_real_counts_of_files_and_tensors() -> None:
    files = bases.MODELS["405B"]().files()
    sizes = [round(sum(map(bases._nbytes, file)) / GB, 2) for file in files]
    assert len(files) == 191 and sizes[:5] == [4.81, 4.03, 4.63, 4.63, 3.49], "those of its repository"
    assert len(bases.MODELS["8B"]().files()) == 4 and len(bases.MODELS["70B"]().files()) == 30


def test_files_are_divided_evenly_and_the_largest_bounds() -> None:
    parts = costs.divided([5, 4, 3, 3, 3], 2)
    assert sorted(number for part in parts for number in part) == [0, 1, 2, 3, 4]
    assert sorted(sum([5, 4, 3, 3, 3][one] for one in part) for part in parts) == [8, 10]

    disk = costs.Place("store", "network", 1e9, duplex=True)
    even = [work(str(number), 2 * GB, a=10**9) for number in range(8)]
    alone = costs.estimate(even, CONSTANTS, disk, 1, 1, 0.0)
    assert alone.seconds == pytest.approx(16.0) and alone.bound == "network"
    assert costs.estimate(even, CONSTANTS, disk, 8, 1, 0.0).seconds == pytest.approx(2.0)
    uneven = [*even, work("large", 10 * GB)]
    bound = costs.estimate(uneven, CONSTANTS, disk, 64, 1, 0.0)
    assert bound.seconds == pytest.approx(10.0) and bound.bound == "file" and bound.balance < 0.1
    slow = [work(str(number), 2 * GB, a=8 * 10**9) for number in range(8)]
    assert costs.estimate(slow, CONSTANTS, disk, 8, 2, 0.0).bound == "processor"
    assert costs.estimate(slow, CONSTANTS, disk, 8, 2, 0.0).seconds == pytest.approx(4.0)
    assert costs.estimate(even, CONSTANTS, disk, 8, 1, 100.0).bound == "planning"


def test_a_shared_folder_is_bounded_by_all_workers_together() -> None:
    disk, share, *networks = costs.places()
    even = [work(str(number), GB) for number in range(64)]
    one, many = (costs.estimate(even, CONSTANTS, share, count, 1, 0.0).seconds for count in (1, 64))
    assert one == many == pytest.approx(128.0), "reading and writing share its rate"
    assert not disk.shared and [place.each for place in networks] == [1.25e9, 3.125e9, 12.5e9]


def test_parts_of_an_object_are_not_too_many() -> None:
    assert work("one", PARTS[0]).parts == 3 and work("two", PARTS[0] + 1).parts == 4
    assert 5_000 < work("large", 10_000 * PARTS[0] + 1).parts < 5_010, "larger parts from 84 GB on"


def test_the_tables_are_written_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bases.MODELS, "8B", tiny)
    monkeypatch.setattr(scale, "ADAPTERS", {"LoRA r = 4, all": ("lora", 4, ()), "tile": ("tile", 4, ("self_attn",))})
    monkeypatch.setattr(scale, "measured", lambda *given: CONSTANTS)
    monkeypatch.setattr(scale, "in_a_process", scale.planned)
    monkeypatch.setattr(common, "machine", lambda *modules: "a machine")
    page = tmp_path / "scale.md"
    page.write_text("before\n<!-- scale: written by make scale -->\nbygone\n<!-- end of scale -->\nafter\n")
    kept = tmp_path / "kept.json"
    command = ["--only", "8B", "--work", str(tmp_path), "--write", str(page)]
    scale.main([*command, "--json", str(kept)])
    text = page.read_text()
    assert (
        text.startswith("before\n<!-- scale")
        and text.endswith("<!-- end of scale -->\nafter\n")
        and "bygone" not in text
    )
    for part in ("ns of CPU an element", "LoRA r = 4, all", "object store, 100 Gbit/s", "balance, 64"):
        assert part in text
    assert len(json.loads(kept.read_text())["plans"]) == 2
    scale.main([*command, "--from", str(kept)])
    assert page.read_text() == text


def test_the_example_of_the_page_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    shape = tiny()
    base = bases.write_base(tmp_path / "my-base", shape)
    bases.write_adapter(tmp_path / "my-adapter", shape, base, "lora", 4)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/scale.md", "exec"), {})
    merge("my-adapter", "whole")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "my-model").iterdir()} == names
    for name in names - {"fossil_export.json"}:
        assert (tmp_path / "my-model" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_floor_is_a_copy_of_the_weights_and_fails_if_one_file_does(tmp_path: Path) -> None:
    base = bases.write_base(tmp_path / "base", tiny())
    common.spent(floor.floor(base, tmp_path / "copy"))
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(SystemExit, match="failed"):
        common.spent(floor.at_once(["false", "true"]))


def test_merges_are_held_against_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dict.fromkeys(merge_benchmark.LINEARS, (128, 128))
    for name, value in {"LINEARS": small, "HIDDEN": 128, "INNER": 128, "HEADS": 1, "KV_HEADS": 1}.items():
        monkeypatch.setattr(merge_benchmark, name, value)
    monkeypatch.setattr(merge_benchmark, "make_base", partial(merge_benchmark.make_base, vocabulary=64))
    monkeypatch.setattr(common, "machine", lambda *modules: "a machine")
    monkeypatch.setattr(floor.os, "sync", lambda: None)
    floor.main(["--size", "0.001", "--runs", "1", "--dtypes", "float32", "--only", "^q,v$", "--work", str(tmp_path)])
    found = capsys.readouterr().out
    assert "| dd, direct, 4 at once |" in found and "| q,v |" in found and "1.15×" in found and "verify" not in found
    assert not (tmp_path / "output").exists() and (tmp_path / "base-0.0005-float32" / "config.json").exists()
