"""Outputs, devices and options that make no sense: one line, exit code 1 or 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusal_tools import WEIGHTS, refused, run


@pytest.mark.parametrize("where", ["base/out", "adapter/out", "base", "adapter", "."])
def test_output_never_touches_the_inputs(where: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused(run("merge", adapter, "--output", tmp_path / where, "--overwrite"), "--output")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_output_that_is_an_input_is_said_to_be_one(adapter: Path) -> None:
    refused(run("merge", adapter, "--output", adapter), "is an input, which is only read")


def test_a_missing_choice_is_told_in_one_line(adapter: Path, tmp_path: Path) -> None:
    result = run("convert", adapter, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "\\" not in result.stderr
    assert "Missing option '--to'. Choose from: lora, gguf-lora, miss, onnx-adapter" in result.stderr.splitlines()[0]


def test_output_through_a_link_into_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    refused(run("merge", adapter, "--output", tmp_path / "link" / "out"), "lies inside")


def test_existing_output(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    refused(run("merge", adapter, "--output", tmp_path / "full"), "exists already", "--overwrite")
    refused(run("merge", adapter, "--output", tmp_path / "full", "--overwrite"), "not written by fossil-export")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
    refused(run("merge", adapter, "--output", adapter / WEIGHTS), "--output")
    (tmp_path / "file").write_text("")
    refused(run("merge", adapter, "--output", tmp_path / "file"), "not a folder")


def test_paths_that_cannot_be(adapter: Path, tmp_path: Path) -> None:
    refused(run("merge", "~nobody-of-that-name/x", "--output", tmp_path / "merged"), "no usable path")
    refused(run("merge", "x" * 300, "--output", tmp_path / "merged"), "x" * 300)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(run("merge", adapter, "--output", tmp_path / "loop"), "loop")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300])
def test_a_base_that_is_only_named_need_not_be_a_path(name: str, adapter: Path, tmp_path: Path) -> None:
    assert run("convert", adapter, "--to", "miss", "--base", name, "--output", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == name


def test_a_base_with_a_zero_character_is_none(adapter: Path, tmp_path: Path) -> None:
    refused(
        run("convert", adapter, "--to", "miss", "--base", "a\0b", "--output", tmp_path / "out"),
        "holds a zero character",
    )


def test_device_that_is_not_here(adapter: Path, tmp_path: Path) -> None:
    refused(run("merge", adapter, "--output", tmp_path / "merged", "--device", "cuda:7"), "'cuda:7'", "--device cpu")
    for device in ("toaster", "meta", "mps", "xpu:0", "cpu:1", "cuda:", "0", ""):
        result = run("merge", adapter, "--output", tmp_path / "merged", "--device", device)
        assert result.exit_code == 2 and f"device is {device!r}, expected cpu, cuda or cuda:N" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("options", [(["--debug"], []), ([], ["--debug"])])
def test_debug_shows_the_traceback(options: tuple[list[str], list[str]], tmp_path: Path) -> None:
    before, after = options
    result = run(*before, "merge", tmp_path / "nothing", "--output", tmp_path / "merged", *after)
    *told, last = result.stderr.splitlines()
    assert result.exit_code == 1 and told[0].startswith("Traceback") and "AdapterError" in result.stderr
    assert last.startswith("error: ")


def test_usage_errors_exit_with_2(adapter: Path) -> None:
    assert run("merge", adapter).exit_code == 2
    assert run("merge", adapter, "--dtype", "int8", "--output", "x").exit_code == 2
