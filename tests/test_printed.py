"""What is printed: nothing that a terminal would obey, in any encoding, from one place."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import edit_json, weights
from refusal_tools import CONFIG, WEIGHTS, run
from safetensors.torch import save_file

import fossil_export
from fossil_export._console import any_encoding, print_json, print_table
from fossil_export.cli import main

PACKAGE = Path(fossil_export.__file__).parent
EVIL = "\x1b[2J\u202e\x9b\x07\u2028\n"


def test_only_one_module_prints() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if "print(" not in (text := path.read_text()) and "echo(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "click.echo",
                "click.secho",
                "echo_via_pager",
            ):
                found.append(path.relative_to(PACKAGE).as_posix())
    assert set(found) == {"_console.py", "models/make_table.py"}  # the second is run by hand


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", f"no{EVIL}where"],
        ["inspect", "a", f"b{EVIL}"],
        ["merge", "a", "--dtype", f"float{EVIL}"],
        ["merge", "a", f"--{EVIL}"],
        ["merge", f"a={EVIL}", "--output", "b"],
        [f"--{EVIL}"],
        [f"verb{EVIL}"],
        ["convert", "a", "--to", "lora", "--output", "x", "--rank", EVIL],
    ],
)
def test_what_was_typed_is_quoted_harmlessly(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert result.output.replace("\n", "").isprintable(), result.output
    assert "\\x1b" in result.output


def named(adapter: Path) -> None:
    """An adapter whose base and saved module have names to fear."""
    tensors = weights(adapter)
    tensors[f"base_model.model.ev{EVIL}il.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, adapter / WEIGHTS)
    edit_json(adapter / CONFIG, modules_to_save=[f"ev{EVIL}il"])


def test_names_are_printed_harmlessly(adapter: Path) -> None:
    named(adapter)
    shown, as_json = run("inspect", adapter, "--all"), run("inspect", adapter, "--json")
    for result in (shown, as_json):
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert result.output.replace("\n", "").isprintable(), result.output
    assert "\\x1b" in shown.output and "\\n" in shown.output
    assert as_json.stdout.count("\n") == 1
    assert any(EVIL in name for name in strings(json.loads(as_json.stdout)))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for one in value if isinstance(value, list) else []:
        yield from strings(one)
    if isinstance(value, str):
        yield value


def test_an_encoding_without_the_letters_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    any_encoding()
    print_table(["module"], [["é漢\ud800"]])
    print_json({"é漢": "\ud800"})
    sys.stdout.flush()
    assert written.getvalue() == (b"module\n\xe9\\u6f22\\ud800\n" + json.dumps({"é漢": "\ud800"}).encode() + b"\n")


def test_json_keeps_letters_where_they_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"é漢": "\x1b"})
    assert capsys.readouterr().out == '{"é漢": "\\u001b"}\n'
