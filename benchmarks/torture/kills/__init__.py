"""Commands killed at moments drawn uniformly from their run; only those that were still running count."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.kills.scene import CASES, TAKEN_UP, Case, make
from torture.kinds import Options
from torture.rows import Row
from torture.workers import in_workers

COUNT = 1200
"""Of six, five are SIGKILL."""

OUTCOMES = {
    "nothing": True,  # is under the name
    "old": True,  # what was to be replaced is there, whole
    "whole": True,  # the result is there; what was left beside it is cleared all the same
    "aside": True,  # the old folder has another name, and the next run gives it back (only without renameat2)
    "remains": True,  # after a signal that it could have cleaned up after; the next run did
    "half": False,
    "lost": False,  # neither the old folder nor the new one
    "other": False,  # the next run fails, or makes other bytes
    "left": False,  # after the next run, too
    "twice": False,  # the next run wrote a file again that was finished
    "word": False,  # another exit code, or more than one word
    "stuck": False,
    "late": False,  # the run always ended first
}

Attempt = tuple[int, str, signal.Signals, int]
"""Number of the case, place, signal, seed."""


def run(options: Options, report: Callable[[Row], None]) -> None:
    wanted = [one for one in planned(options) if (_name(CASES[one[0]], one[2]), one[1], one[3]) not in options.done]
    if not wanted:
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    end = time.time() + options.seconds
    folders = {place: tempfile.mkdtemp(prefix="torture-", dir=where) for place, where in places().items()}
    context = multiprocessing.get_context("spawn")
    try:
        maker = context.Process(target=_make, args=(folders,))
        maker.start()
        maker.join()
        shares = [wanted[first :: options.jobs] for first in range(options.jobs)]
        in_workers(_serve, [(folders, number, share, end) for number, share in enumerate(shares) if share], report)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def places() -> dict[str, Path]:
    """A disk, as far as the one this runs on is one, and tmpfs."""
    Path("build").mkdir(exist_ok=True)
    memory = Path("/dev/shm")
    return {"disk": Path("build").resolve()} | ({"tmpfs": memory} if memory.is_dir() else {})


def planned(options: Options) -> list[Attempt]:
    """The attempts in their order: cases and places in turn, every sixth with a signal that can be caught."""
    cases = [number for number, case in enumerate(CASES)]
    kills = [(case, place, signal.SIGKILL) for case in cases for place in places()]
    others = [
        (case, place, number) for number in (signal.SIGINT, signal.SIGTERM) for case in cases for place in places()
    ]
    counts = Counter[int]()
    found = []
    for number in range(options.count):
        kinds = others if number % 6 == 5 else kills
        turn = counts[len(kinds)]
        counts[len(kinds)] += 1
        case, place, sent = kinds[turn % len(kinds)]
        found.append((case, place, sent, options.seed + turn // len(kinds)))
    return [one for one in found if re.search(options.only, _name(CASES[one[0]], one[2]))]


def table(rows: list[Row]) -> str:
    lines = [
        "| command | signal | place | interrupted | nothing there | old whole | new whole | half | lost "
        "| rerun differs | taken up by it | written twice | left after it | else bad |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row.outcome != "late"]
    for case, place in sorted({(row.case, row.place) for row in rows}, key=lambda one: (_order(one[0]), one[1])):
        own = [row for row in rows if (row.case, row.place) == (case, place)]
        counts = Counter(row.outcome for row in own)
        command, _, sent = case.partition(", ")
        cells = (
            counts.total(),
            counts["nothing"] + counts["remains"],
            counts["old"] + counts["aside"],
            *(counts[name] for name in ("whole", "half", "lost", "other")),
            sum(f" {TAKEN_UP}" in row.detail and f" 0 {TAKEN_UP}" not in row.detail for row in own),
            *(counts[name] for name in ("twice", "left")),
            counts["word"] + counts["stuck"],
        )
        lines.append(f"| `{command}` | {sent} | {place} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    killed = sum(row.case.endswith("SIGKILL") for row in rows)
    remains = sum(row.outcome == "remains" for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            f"{killed:,} runs by SIGKILL and {len(rows) - killed:,} by other signals, at moments drawn uniformly from "
            "the time that an undisturbed run takes. The clock starts in a process that has imported its libraries, so "
            "that every kill falls on the work itself. A run that ended before its signal is not counted. After each "
            f"one the same command runs again. SIGINT and SIGTERM left something for that run {remains:,} times.",
        ]
    )


def _order(name: str) -> tuple[int, int]:
    command, _, sent = name.partition(", ")
    return [case.name for case in CASES].index(command), -getattr(signal, sent)


def _name(case: Case, number: signal.Signals) -> str:
    return f"{case.name}, {number.name}"


def _make(folders: dict[str, str]) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore")
    first, *others = (Path(folder) / "inputs" for folder in folders.values())
    make(first)
    for other in others:
        shutil.copytree(first, other)


def _serve(folders: dict[str, str], worker: int, wanted: list[Attempt], end: float, rows: Any) -> None:
    from torture.kills.attempt import Bench
    from torture.kills.hub import Hub

    own = {place: Path(folder) / f"worker-{worker}" for place, folder in folders.items()}
    for folder in own.values():
        folder.mkdir()
    first = next(iter(folders))
    hub = Hub(own[first], Path(folders[first]) / "inputs")
    benches: dict[tuple[int, str], Bench] = {}
    try:
        for number, place, sent, seed in wanted:
            if time.time() > end:
                break
            if (bench := benches.get((number, place))) is None:
                inputs = Path(folders[place]) / "inputs"
                repos = f"{number}-{place}"
                bench = benches[number, place] = Bench(CASES[number], own[place], inputs, hub, repos)
            rows.put(bench.attempt(place, sent, _name(CASES[number], sent), seed))
    finally:
        hub.close()
