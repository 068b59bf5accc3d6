"""The README's commands and snippets, as they are printed, one after the other in one folder."""

from __future__ import annotations

import json
import re

import pytest
from page_tools import ROOT, blocks, place, run

README = ROOT / "README.md"


def test_every_block_runs_in_order(tmp_path_factory: pytest.TempPathFactory) -> None:
    with place(tmp_path_factory.mktemp("readme")) as (folder, variables):
        said = [run(block, folder, variables) for block in blocks(README)]
        assert sum("parity" in text for text in said) >= 3
        certificate = json.loads((folder / "my-model" / "fossil_parity.json").read_text())
        assert certificate["parity"] and (folder / "parity.html").is_file()


def test_the_blocks_are_found() -> None:
    """If the README's form changes, the test above must not run nothing."""
    code = "\n".join(block.code for block in blocks(README))
    for words in (
        "fossil-export merge",
        "inspect",
        "onnx",
        "convert",
        "push",
        "verify",
        "og.Generator",
        "import merge",
    ):
        assert words in code


def test_it_is_read_in_minutes() -> None:
    assert len(README.read_text().split()) < 1500


def test_it_begins_with_what_its_reader_has() -> None:
    first = re.split(r"\n\n", README.read_text())[1]
    assert first.startswith("You trained an adapter with PEFT")
