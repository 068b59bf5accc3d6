"""JSON files and headers: read within bounds and in UTF-8 alone, what is odd in them carried or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import edit_json, weights
from refusal_tools import CONFIG, WEIGHTS, first_file, refused, run

INDEX = "model.safetensors.index.json"


def huge(path: Path) -> None:
    os.truncate(path, 1 << 34)  # of holes


def many(path: Path) -> None:
    path.write_text('{"a": [' + "[]," * 2_000_000 + "1]}")


def utf_16(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def marked(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path) -> None:
    path.write_text("[" * 500_000 + "]" * 500_000)


def long_number(path: Path) -> None:
    path.write_text('{"a": ' + "9" * 5000 + "}")


@pytest.mark.parametrize("damage", [huge, many, utf_16, marked, deep, long_number])
@pytest.mark.parametrize("file", ["adapter/" + CONFIG, "base/config.json", f"base/{INDEX}"])
def test_a_json_file_out_of_bounds_is_refused(
    damage: Callable[[Path], None], file: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    damage(tmp_path / file)
    refused(run("merge", adapter, "--output", tmp_path / "merged"), file.rpartition("/")[2])


def test_json_with_too_many_parts_is_not_called_broken(base: Path, adapter: Path, tmp_path: Path) -> None:
    many(tmp_path / "base" / "config.json")
    result = run("merge", adapter, "--output", tmp_path / "merged")
    refused(result, "config.json", "too large for its kind")
    assert "not valid JSON" not in result.stderr


def test_a_pipe_is_not_waited_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in (adapter / CONFIG, base / "config.json"):
        kept = file.read_bytes()
        pipe(file)
        refused(run("merge", adapter, "--output", tmp_path / "merged"), file.name)
        file.unlink()
        file.write_bytes(kept)


@pytest.mark.parametrize("before", [b" ", b"\xef\xbb\xbf", b"\n"])
def test_a_header_that_the_library_does_not_read_is_refused(before: bytes, base: Path, adapter: Path) -> None:
    for path in (first_file(base), adapter / WEIGHTS):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        size = (length + len(before)).to_bytes(8, "little")
        path.write_bytes(size + before + content[8:])
        refused(run("merge", adapter, "--dry-run"), path.name, "header")
        path.write_bytes(content)


def test_half_a_character_in_a_config_is_carried(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As the escape that it was: no UTF-8 has it, and both libraries write it so."""
    edit_json(base / "config.json", note="\ud800", name_or_path="x\udfff")
    edit_json(adapter / CONFIG, revision=None, task_type="\ud800")
    result = run("merge", adapter, "--output", tmp_path / "merged", "--json", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes())["note"] == "\ud800"
    assert weights(tmp_path / "merged")
