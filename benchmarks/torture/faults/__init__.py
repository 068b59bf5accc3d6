"""Commands whose system calls fail, one at each place: each must end in a right result or one line."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torture.faults import places as spoil
from torture.faults.attempts import FAULTS, Bench, attempt, sound_run
from torture.faults.calls import why_not
from torture.faults.scenes import COMMANDS, make
from torture.fuzz.running import preload
from torture.kinds import Options
from torture.rows import Row
from torture.workers import in_workers

COUNT = 4_200

OUTCOMES = {
    "right": True,  # ended well, byte for byte what it makes on a sound disk
    "refused": True,  # one line with the file, the system's words and a remedy; what was there before is there
    "warned": True,  # `verify`: its verdict, and a warning that the certificate is not written
    "unfired": True,  # this time there were fewer calls; nothing failed
    "lost": False,  # ended well with another result
    "unsynced": False,  # ended well although the disk did not take it
    "half": False,  # refused, and something under the output's name, or another old folder
    "left": False,  # something left that the next run does not clear
    "vague": False,  # a line without the file to blame, the system's words or a remedy
    "silent": False,
    "chatter": False,
    "traceback": False,
    "ended": False,  # another exit code, or a signal
    "slow": False,
}


def run(options: Options, report: Callable[[Row], None]) -> None:
    if reason := why_not():
        sys.exit(f"faults: {reason}")
    end = time.time() + options.seconds
    in_workers(_serve, [(options, share, end) for share in range(options.jobs)], report)


def _serve(options: Options, share: int, end: float, rows: Any) -> None:
    warm()
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as work:
        bench = Bench(Path(work).resolve() / "sound", Path(work).resolve() / "here")
        make(bench.sound)
        wanted = re.compile(options.only).search
        names = [one.name for one in (*FAULTS, *spoil.SORTS)]
        found = {
            command.name: sound_run(command, bench)
            for command in spoil.ALSO
            if any(wanted(f"{command.name}: {name}") for name in names)
        }
        places = []
        for command in COMMANDS:
            for fault in FAULTS:
                if wanted(f"{command.name}: {fault.name}"):
                    count = sum(fault.hits(call) for call in found[command.name].calls)
                    places += [(command, fault, number) for number in range(options.seed, count)]
        tries: list[tuple[str, int, Callable[[], Row]]] = [
            (f"{c.name}: {fault.name}", n, partial(attempt, c, fault, n, found[c.name], bench))
            for c, fault, n in places
        ]
        tries += [
            (f"{c.name}: {sort.name}", n, partial(spoil.attempt, c, sort, n, path, found[c.name], bench))
            for c, sort, n, path in spoil.all_places(wanted, bench)
            if n >= options.seed
        ]
        count = min(options.count, len(tries))
        chosen = [tries[len(tries) * number // count] for number in range(count)]
        for case, number, make_row in chosen[share :: options.jobs]:
            if time.time() > end:
                break
            if (case, "", number) not in options.done:
                rows.put(make_row())


def warm() -> None:
    """Import once what each attempt would import anew."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    preload()
    import fossil_export

    for module in pkgutil.walk_packages(fossil_export.__path__, "fossil_export."):
        if not module.name.endswith(("__main__", "make_table", "kernels._library")):
            importlib.import_module(module.name)
    for name in ("gguf", "onnx", "onnx_ir", "onnxruntime"):
        importlib.import_module(name)


def table(rows: list[Row]) -> str:
    kinds = [one.name for one in (*FAULTS, *spoil.SORTS)]
    lines = [
        "| command | calls failed | refused in a line | right | warned | bad |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row.outcome != "unfired"]
    for place in (0, 1):
        names = [command.name for command in spoil.ALSO] if place == 0 else kinds
        for name in names:
            counts = Counter(row.outcome for row in rows if row.case.split(": ")[place] == name)
            if counts:
                bad = sum(count for outcome, count in counts.items() if not OUTCOMES[outcome])
                cells = (counts.total(), counts["refused"], counts["right"], counts["warned"], bad)
                lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
        if place == 0:
            lines += [
                "",
                "| fault | calls failed | refused in a line | right | warned | bad |",
                "|---|---|---|---|---|---|",
            ]
    return "\n".join(lines)
