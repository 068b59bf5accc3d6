"""python -m mutants: changes of one place in the package, each of which a test ought to notice; exit code 1 where one
survives that nobody has judged (judged.jsonl).

A driver of our own, since the suite takes half an hour: mutmut chooses tests by function, which for a merge is nearly
all of them, makes all mutants before the first one runs, samples none, and leaves out module tables and defaults;
cosmic-ray starts a process for each mutant, where importing PyTorch takes longer than the tests. Here the tests that
run the very line, cheap ones first, go for some seconds in a fork that has PyTorch already.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torture.__main__ import replace_part

from mutants import lines, warm
from mutants.attempts import BAD, KINDS, Journal, Row, attempt, judgements, keys, sample

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/mutants"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="mutants, evenly over the lines that tests run (500)")
    parser.add_argument("--seed", type=int, default=0, help="another sample (0)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of lines whose file:line has this")
    parser.add_argument("--tests", default="", metavar="REGEX", help="with files of tests whose name has this alone")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--budget", type=float, default=12, metavar="S", help="seconds of tests for a mutant (12)")
    parser.add_argument("--survivors", action="store_true", help="try those of the journal again")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    given = parser.parse_args()
    os.chdir(ROOT)
    tests = lines.files_of_tests(ROOT / "tests", given.tests)
    warm.warm_up()
    in_parallel(given.jobs, lambda job, tree: lines.record(tree, tests[job :: given.jobs], FOLDER / "record"))
    known = lines.read(tests, FOLDER / "record", ROOT)
    print(f"{len(known.seconds)} tests; {given.count} mutants from seed {given.seed}", file=sys.stderr)
    journal = Journal(ROOT / "build/mutants.jsonl")
    before = {row.key: row for row in journal.rows()}
    places = sample(ROOT, known, given.seed, given.only)
    if given.survivors:
        places = [one for one in sample(ROOT, known, given.seed, given.only, every=True) if one.key in before]
        wanted = [one for one in places if before[one.key].outcome in BAD]
    else:
        wanted = [one for one in places[: given.count] if one.key not in before]

    def work(job: int, tree: Path) -> None:
        for place in wanted[job :: given.jobs]:
            journal.add(attempt(place, tree, known, given.budget, FOLDER / f"{job}.log"))

    in_parallel(given.jobs, work)
    there = keys(ROOT)
    rows = [row for row in journal.rows() if row.key in there]
    judged = judgements()
    left = [row for row in rows if row.outcome in BAD and row.key not in judged]
    for row in left:
        print(f"{row.file}:{row.line}: {row.old!r} -> {row.new!r}: {row.outcome}, {row.tests} tests\n    {row.text}")
    print(dict(Counter(row.outcome for row in rows)), f"{len(left)} not judged", file=sys.stderr)
    if given.write:
        replace_part(given.write, "mutants", table(rows, judged), "mutants")
    return int(bool(left))


def in_parallel(jobs: int, call: Callable[[int, Path], None]) -> None:
    """`call(job, tree)` in so many forks, each with a copy of the package of its own."""
    pids = []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with warm.copied_package(ROOT, FOLDER / f"copy-{job}") as tree:
                    warm.take_package_from(tree)
                    call(job, tree)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(codes):
        sys.exit("a worker failed")


def table(rows: list[Row], judged: dict[str, str]) -> str:
    """By package: mutants, killed, and what the survivors are."""
    rows = [row for row in rows if row.outcome != "no program"]
    kinds = sorted(set(KINDS) | set(judged.values()))
    packages: dict[str, list[Row]] = {}
    for row in rows:
        packages.setdefault(row.file.split("/")[1], []).append(row)
    out = [
        f"| package | made | killed | {' | '.join(kinds)} | gaps, or not judged |",
        f"|---|--:{'|--:' * (len(kinds) + 2)}|",
    ]
    for name, own in [*sorted(packages.items()), ("together", rows)]:
        alive = [row for row in own if row.outcome in BAD]
        counts = Counter(judged.get(row.key, "") for row in alive)
        cells = [len(own), len(own) - len(alive), *(counts[kind] for kind in kinds), counts[""]]
        out.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
