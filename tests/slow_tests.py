"""Which tests are slow (`slow.txt`): `make test-fast` leaves them out, and a whole run begins with the files that
have most of them.

`python tests/slow_tests.py build/tests.xml` writes the list anew from what a run on a quiet machine measured (pytest's
`--junitxml`); with `--check` it only says what has become slow since.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

LIST = Path(__file__).with_name("slow.txt")
SLOW = 0.2
"""Seconds, with fixtures, that one case of a fast test may take: then all fast ones take some 100 s on two cores."""
WORTH_A_WORD = 1.0
"""Seconds from which `--check` speaks of a test that is not listed."""

Name = tuple[str, str]
"""A file of tests and a function in it."""


def slow_tests(path: Path = LIST) -> dict[Name, float]:
    """Of each slow test the seconds that all its cases take together."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = (line.split() for line in lines if line and not line.startswith("#"))
    return {(name.split("::")[0], name.split("::")[1]): float(seconds) for seconds, name in found}


def measured(report: Path) -> tuple[dict[Name, float], dict[Name, float]]:
    """Of each test in a JUnit report the longest case and all cases together, in seconds."""
    longest: dict[Name, float] = {}
    together: dict[Name, float] = defaultdict(float)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        file = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), None)
        if file is None:  # a file that could not be collected
            continue
        name = f"{file}.py", case.get("name", "").split("[")[0]
        seconds = float(case.get("time", "0"))
        longest[name] = max(longest.get(name, 0.0), seconds)
        together[name] += seconds
    return longest, together


def chosen(tests: Iterable[Name], slow: dict[Name, float]) -> set[Name]:
    """The fast ones, and of a file that has none its quickest, so that each subject is looked at."""
    tests = set(tests)
    fast = {name for name in tests if name not in slow}
    for file in {file for file, _ in tests} - {file for file, _ in fast}:
        fast.add(min((name for name in tests if name[0] == file), key=lambda name: (slow[name], name)))
    return fast


def unknown(slow: Collection[Name], folder: Path = LIST.parent) -> list[str]:
    """Listed tests that are no more."""
    texts = {
        file: (folder / file).read_text() if (folder / file).exists() else "" for file in {file for file, _ in slow}
    }
    return sorted(f"{file}::{name}" for file, name in slow if f"def {name}(" not in texts[file])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write or check tests/slow.txt.")
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--check", action="store_true", help="only say which tests over a second are not in the list")
    options = parser.parse_args()
    longest, together = measured(options.report)
    if options.check:
        new = sorted(name for name in longest.keys() - slow_tests() if longest[name] > WORTH_A_WORD)
        for file, name in new:
            print(f"{longest[file, name]:5.1f} s {file}::{name} is not in tests/slow.txt")
        if new:
            print("On a quiet machine, `make slow-tests` writes them there.")
        return
    lines = [f"{together[name]:.1f} {name[0]}::{name[1]}" for name in sorted(longest) if longest[name] > SLOW]
    LIST.write_text(f"# Written by slow_tests.py: tests with a case over {SLOW} s, and the seconds of all cases.\n")
    with LIST.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    print(f"{len(lines)} of {len(longest)} tests are slow", file=sys.stderr)


if __name__ == "__main__":
    main()
