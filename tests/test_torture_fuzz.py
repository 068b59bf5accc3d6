"""A few damaged inputs of every format: each ends right or in one line (`make torture` makes thousands)."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from torture import fuzz
from torture.fuzz.running import attempt
from torture.fuzz.subject import Unjudged
from torture.kinds import Options
from torture.rows import Row

SHORT = (
    *("adapter_config.json", "adapter tensors, all methods", "base tensors", "index of a base", "MLX adapter"),
    *("verify: merged config", "options of merge", "hostile names", "base of fp8: tensors", "base of awq: config"),
    *("pytorch_model.bin (archive)", "RWKV adapter.pth: tensors", "GGUF: table", "--onnx, matmul", "README.md"),
    *("single files", "shards of an adapter", "checkpoints of a run"),
)
"""One of each module, and of those whose damage differs most."""


@pytest.mark.skipif(sys.platform != "linux", reason="the harness bounds processes as Linux does")
def test_damaged_inputs_end_as_promised() -> None:
    """The same attempts each time, however slow the machine is."""
    rows: list[Row] = []
    only = "|".join(f"^{re.escape(name)}$" for name in SHORT)
    fuzz.run(Options(len(SHORT), 20_000, 600.0, only, 1, frozenset()), rows.append)
    assert [row for row in rows if not fuzz.OUTCOMES[row.outcome]] == []
    assert len(rows) == len(SHORT)


@dataclass(frozen=True)
class Fixed:
    """What a judge says of a command that needs no input."""

    arguments: tuple[str, ...]
    said: str | None
    name: str = "fixed"

    def make(self, folder: Path) -> None:
        folder.mkdir()

    def mutate(self, folder: Path, random: Random) -> str:
        return ""

    def command(self, folder: Path, random: Random) -> list[str]:
        return list(self.arguments)

    def judge(self, folder: Path) -> str | None:
        if self.said == "cannot say":
            raise Unjudged(self.said)
        return self.said


@pytest.mark.parametrize(
    "arguments, said, outcome",
    [
        (("--version",), None, "right"),
        (("--version",), "differs", "wrong"),
        (("--version",), "cannot say", "unjudged"),
        (("inspect", "/no/where"), "never asked", "refused"),
    ],
)
def test_the_harness_tells_outcomes_apart(
    arguments: tuple[str, ...], said: str | None, outcome: str, tmp_path: Path
) -> None:
    assert attempt(Fixed(arguments, said), 0, tmp_path).outcome == outcome
