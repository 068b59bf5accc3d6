"""`python -m torture kills`, a few of them; and what its judge calls harm."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torture import kills
from torture.kills.attempt import Bench
from torture.kills.process import Ended
from torture.kills.scene import CASES, make
from torture.kinds import Options

NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "inputs"
    make(folder)
    return folder


def bench(name: str, inputs: Path, tmp_path: Path) -> Bench:
    hub: Any = None  # nothing of these is published
    return Bench(NAMED[name], tmp_path, inputs, hub, "none")


@pytest.mark.parametrize("name", ["merge --overwrite", "convert --to gguf-lora"])
def test_kills_do_no_harm(name: str, inputs: Path, tmp_path: Path) -> None:
    ready = bench(name, inputs, tmp_path)
    numbers = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
    rows = [ready.attempt("disk", number, name, seed) for seed, number in enumerate(numbers)]
    allowed = {"old", "whole"} if NAMED[name].replaces else {"nothing", "whole", "remains"}
    assert {row.outcome for row in rows} <= allowed, rows


def test_harm_is_seen(inputs: Path, tmp_path: Path) -> None:
    ready = bench("merge --overwrite", inputs, tmp_path)
    killed, output = Ended(-signal.SIGKILL, 0.1, ""), tmp_path / "run" / "out"

    def outcome(status: Ended = killed, number: signal.Signals = signal.SIGKILL) -> str:
        found = ready._outcome(status, number)[0]
        ready._fresh()
        return found

    ready._fresh()
    assert outcome() == "old"
    (output / "config.json").unlink()
    assert outcome() == "half"
    shutil.rmtree(output)
    assert outcome() == "lost"
    (tmp_path / "run" / "tmp").mkdir()
    (tmp_path / "run" / "tmp" / "strange").write_text("")
    assert outcome() == "left"
    assert outcome(Ended(1, 0.1, "Aborted!\n"), signal.SIGINT) == "word"
    assert outcome(Ended(130, 0.1, "Aborted!\nTraceback"), signal.SIGINT) == "word"


def test_five_of_six_are_sigkill_and_every_command_has_its_turn() -> None:
    planned = kills.planned(Options(kills.COUNT, 0, 1.0, "", 1, frozenset()))
    killed = [one for one in planned if one[2] == signal.SIGKILL]
    assert (len(planned), len(killed)) == (1200, 1000) and len(set(planned)) == 1200
    assert {one[0] for one in killed} == {one[0] for one in planned if one not in killed} == set(range(len(CASES)))
