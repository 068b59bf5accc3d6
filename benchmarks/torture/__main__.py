"""python -m torture: exit code 1 where an attempt did not end as promised."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import cast

from torture.kinds import KINDS, Kind, Options
from torture.rows import Journal, Row

BEGIN, END = "<!-- {}: written by make {} -->", "<!-- end of {} -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--count", type=int, help="attempts of each kind (those of the table)")
    parser.add_argument("--seed", type=int, default=0, help="the first attempt (0)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most, of each kind (3600)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names have this")
    parser.add_argument("--jobs", type=int, default=2, help="attempts at a time (2)")
    parser.add_argument("--journal", type=Path, default=Path("build/torture.jsonl"), help="attempts as they come")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    given = parser.parse_args()
    journal, bad = Journal(given.journal), 0
    for name in given.kinds or KINDS:
        kind = kind_of(name)
        done = frozenset((row.case, row.place, row.seed) for row in journal.rows(name))
        count = kind.COUNT if given.count is None else given.count
        options = Options(count, given.seed, given.seconds, given.only, given.jobs, done)
        attempt(name, kind, options, journal)
        rows = [row for row in journal.rows(name) if re.search(given.only, row.case)]
        bad += sum(not kind.OUTCOMES[row.outcome] for row in rows)
        if given.write:
            replace_part(given.write, name, kind.table(rows))
    return int(bad > 0)


def attempt(name: str, kind: Kind, options: Options, journal: Journal) -> None:
    began, counts = time.monotonic(), Counter[str]()

    def report(row: Row) -> None:
        journal.add(row)
        counts[row.outcome] += 1
        if not kind.OUTCOMES[row.outcome]:
            print(f"{row.case}, {row.place}, seed {row.seed}: {row.outcome} {row.detail}", file=sys.stderr)
        if counts.total() % 100 == 0:
            print(f"{name}: {counts.total()} in {time.monotonic() - began:.0f} s", file=sys.stderr)

    print(f"{name}: {options.count} attempts from seed {options.seed}", file=sys.stderr)
    kind.run(options, report)
    print(f"{name}: {dict(counts)}", file=sys.stderr)


def kind_of(name: str) -> Kind:
    if name not in KINDS:
        sys.exit(f"{name}: no kind of torture; there are {', '.join(KINDS)}")
    return cast(Kind, importlib.import_module(f"torture.{name}"))


def replace_part(page: Path, name: str, text: str, by: str = "torture") -> None:
    """Put `text` between the markers of `name`, which `by` writes."""
    begin, end = BEGIN.format(name, by), END.format(name)
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
