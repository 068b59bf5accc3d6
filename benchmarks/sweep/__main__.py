"""python -m sweep: every class of transformers, merged and judged. Exit code 1 where a result is wrong or crashed."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

from sweep import pool
from sweep.cases import ALL_DONE, ALL_KINDS, CRASH, IMPOSSIBLE, NOT_BUILT, WRONG, Row
from sweep.catalogue import Entry, entries, sample, varied
from sweep.journal import Journal
from sweep.table import summary, support


def main() -> int:
    options = _options()
    chosen = [entry for entry in entries() if not options.only or re.search(options.only, entry.name)]
    if options.sample:
        chosen = sample(chosen, options.sample)
    journal = Journal(options.journal)
    rows = sweep(chosen, tuple(options.kinds), options.jobs, journal)
    print(summary(rows))
    if options.write:
        options.write.write_text(support(rows, options.kinds))
    return int(any(row.result in (WRONG, CRASH) for row in rows))


def sweep(chosen: list[Entry], kinds: tuple[str, ...], jobs: int, journal: Journal) -> list[Row]:
    """The rows of these classes, those that the journal has among them."""
    tasks = [
        pool.Task(entry, kinds, frozenset(journal.done(entry.name)))
        for entry in varied(chosen)
        if not journal.finished(entry.name, list(kinds))
    ]
    began, count, ended = time.monotonic(), len(tasks), 0

    def report(row: Row) -> None:
        nonlocal ended
        journal.add(row)
        if row.kind in (NOT_BUILT, ALL_DONE):
            ended += 1
            if ended % 20 == 0 or ended == count:
                print(f"{ended}/{count} classes, {time.monotonic() - began:.0f} s", file=sys.stderr)
        elif row.result in (WRONG, CRASH):
            print(f"{row.name}, {row.kind}: {row.result} {row.why}", file=sys.stderr)

    def died(task: pool.Task, kind: str, how: str) -> None:
        result = IMPOSSIBLE if kind == NOT_BUILT else CRASH
        report(Row(task.entry.name, task.entry.model_type, kind, result, how))

    pool.run(tasks, jobs, report, died)
    names = {entry.name for entry in chosen}
    wanted = {*kinds, NOT_BUILT, ALL_DONE}
    return [row for row in journal.rows.values() if row.name in names and row.kind in wanted]


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="classes whose names have this")
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=list(ALL_KINDS), help="kinds of adapters")
    parser.add_argument("--sample", type=int, metavar="N", help="so many classes, as different as can be")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--journal", type=Path, default=Path("build/sweep.jsonl"), help="rows as they come")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--family", choices=("miss", "lora"), help="all kinds of adapters of a method, not --kinds")
    options = parser.parse_args()
    if options.family:
        options.kinds = [kind for kind in ALL_KINDS if ("LoRA" in kind or "DoRA" in kind) == (options.family == "lora")]
    return options


if __name__ == "__main__":
    sys.exit(main())
