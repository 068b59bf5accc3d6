"""Damaged inputs: each must end in a right result, or in one line, within 10 s and 1 GB."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable

from torture.fuzz.running import attempts
from torture.fuzz.subject import Subject
from torture.kinds import Options
from torture.rows import Row

COUNT = 10_000

OUTCOMES = {
    "right": True,  # accepted, and an independent judge says that the result is what these inputs mean
    "refused": True,  # one line
    "unjudged": True,  # accepted, and the judge could not read the inputs; counted apart, and looked at
    "wrong": False,
    "traceback": False,
    "chatter": False,  # more than warnings before the line
    "control": False,  # control characters printed
    "slow": False,
    "memory": False,
    "signal": False,
    "left": False,  # something left of an output that was refused
}

SUBJECTS = (
    *("adapters", "mlx", "merged", "options", "hostile", "places"),
    *("quantized_bases", "pickles", "rwkv", "gguf_files"),
    *("graphs", "signatures", "records", "cards"),
)
"""Modules of this package, each with a list `SUBJECTS`."""


def subjects(only: str = "") -> list[Subject]:
    found = [one for name in SUBJECTS for one in importlib.import_module(f"torture.fuzz.{name}").SUBJECTS]
    return [one for one in found if re.search(only, one.name)]


def run(options: Options, report: Callable[[Row], None]) -> None:
    attempts(subjects(options.only), options, report)


def table(rows: list[Row]) -> str:
    lines = ["| input | damaged | refused in a line | right | not judged | bad |", "|---|---|---|---|---|---|"]
    for case in sorted({row.case for row in rows}):
        counts = Counter(row.outcome for row in rows if row.case == case)
        bad = sum(count for outcome, count in counts.items() if not OUTCOMES[outcome])
        cells = (counts.total(), counts["refused"], counts["right"], counts["unjudged"], bad)
        lines.append(f"| {case} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return "\n".join(lines)
