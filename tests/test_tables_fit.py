"""Tables keep within a terminal of 80 columns, and are whole in a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import QV, make_adapter, make_base
from hypothesis import example, given
from hypothesis import strategies as st

from fossil_export.tables._fitting import GAP, fitted, hanging

CELL = st.text("ab./ ,_", max_size=60).map(str.strip)


def shown(columns: int, *command: object) -> list[str]:
    """The lines that a terminal of so many columns is sent."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    line = [sys.executable, "-m", "fossil_export", *map(str, command)]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(line, stdout=child, stderr=subprocess.DEVNULL, env={**plain, "TERM": "xterm"})
    os.close(child)
    found = b""
    while True:
        try:
            found += (block := os.read(parent, 65536))
        except OSError:
            break
        if not block:
            break
    os.close(parent)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).splitlines()


def test_plans_and_inspections_keep_within_80_columns(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=QV)
    for command in (("merge", "--dry-run"), ("inspect",), ("inspect", "--all")):
        lines = shown(80, command[0], tmp_path / "adapter", "--base", base, *command[1:])
        table = lines[: lines.index("")]
        assert len(table) > 1 and max(map(len, table)) <= 80, table
        narrow = shown(44, command[0], tmp_path / "adapter", "--base", base, *command[1:])
        assert max(map(len, narrow[: narrow.index("")])) <= 44


@example([("_____________", "", "0")], 30)
@example([("a... _b./_/, ////////////", "...., , ,_____", "0")], 30)
@given(st.lists(st.tuples(CELL, CELL, st.integers(0, 99999).map(str)), max_size=4), st.integers(30, 120))
def test_a_folded_table_says_all_that_the_whole_one_says(rows: list[tuple[str, ...]], most: int) -> None:
    header = ("name", "what is done", "bytes")
    assert fitted(header, rows, None) == (header, rows)
    told, lines = fitted(header, rows, most)
    assert told == header
    for column in range(3):
        assert "".join("".join(line[column] for line in lines).split()) == "".join(
            "".join(row[column] for row in rows).split()
        )
    pieces = [piece for row in rows for cell in row for piece in re.findall(r"[^./, _]+[./,_]?", cell)]
    if max(map(len, pieces), default=0) <= 4:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        assert sum(widths) + 2 * GAP <= max(most, 12 + 12 + 5 + 2 * GAP)


def test_a_column_that_may_go_goes_before_anything_is_folded() -> None:
    header, row = ("module", "shapes", "change"), ("model.layers.0.mlp.down_proj", "16x1536 + 576x16", "0.01")
    assert fitted(header, [row], 40, less=("shapes",)) == (("module", "change"), [(row[0], row[2])])
    assert fitted(header, [row], 80, less=("shapes",)) == (header, [row])


@pytest.mark.parametrize("most", [20, 33, 80])
def test_a_long_value_goes_on_below_and_paths_are_never_broken(most: int) -> None:
    path = "/home/ada/models/a-very-long-name-of-a-folder/and-another"
    pairs = [("merge", f"stopped: {path} has no weights at all"), ("time", "1.0 s")]
    lines = hanging(pairs, most)
    assert hanging(pairs, None) == pairs and lines[-1] == pairs[-1]
    assert sum(path in value for _, value in lines) == 1
    assert " ".join(value.strip() for _, value in lines[:-1]) == pairs[0][1]
    assert [name for name, _ in lines] == ["merge", *[""] * (len(lines) - 2), "time"]
