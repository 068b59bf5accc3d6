"""A sample of mutants, and what became of each."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from mutants.lines import SCOPE, Tests
from mutants.mutations import Mutation, compiles, mutations
from mutants.warm import PACKAGE, run_pytest

BAD = ("survived", "no test")
"""Outcomes; the others are killed, hung (which a test notices too) and no program."""
KINDS = ("equivalent", "speed", "words")
"""Of survivors that were judged: the result is the same; so it is, sooner or later or in more memory; what is said
differs, or a figure of a report."""
_PATIENCE = 30  # seconds, and thrice what the tests took without a mutant
_JUDGED = Path(__file__).with_name("judged.jsonl")


@dataclass(frozen=True)
class Place:
    """A mutation of a file. `number` tells those of a line which make the same change apart."""

    file: str
    source: bytes
    text: str
    number: int
    mutation: Mutation

    @property
    def key(self) -> str:
        """Stays when the line moves."""
        return "|".join([self.file, self.text, self.mutation.old, self.mutation.new, str(self.number)])


@dataclass(frozen=True)
class Row:
    key: str
    file: str
    line: int
    text: str
    old: str
    new: str
    outcome: str
    tests: int
    seconds: float
    detail: str


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def rows(self) -> list[Row]:
        """Of attempts made twice the last one."""
        text = self._path.read_text() if self._path.is_file() else ""
        found = {row.key: row for row in (Row(**json.loads(line)) for line in text.splitlines())}
        return list(found.values())


def judgements() -> dict[str, str]:
    """What survivors that were looked at are, by key: a word for each."""
    text = _JUDGED.read_text() if _JUDGED.is_file() else ""
    return {row["key"]: row["is"] for row in map(json.loads, text.splitlines())}


def keys(root: Path) -> set[str]:
    """Of all mutants that there can be."""
    return {place.key for places in _by_line(root) for place in places}


def _by_line(root: Path) -> list[list[Place]]:
    by_line: list[list[Place]] = []
    for path in sorted(path for name in SCOPE for path in (root / PACKAGE / name).rglob("*.py")):
        file = str(path.relative_to(root))
        source = path.read_bytes()
        text = source.decode().splitlines()
        own: dict[int, list[Place]] = defaultdict(list)
        same: Counter[tuple[str, str, str]] = Counter()
        for one in mutations(source):
            line = text[one.line - 1].strip()
            of = (line, one.old, one.new)
            own[one.line].append(Place(file, source, line, same[of], one))
            same[of] += 1
        by_line += own.values()
    return by_line


def sample(root: Path, known: Tests, seed: int, only: str, every: bool = False) -> list[Place]:
    """A mutation for each line that tests run, the lines in random order; or all mutations of `every` line."""
    by_line = [
        places
        for places in _by_line(root)
        if re.search(only, f"{places[0].file}:{places[0].mutation.line}") and _tests(places[0], known)
    ]
    if every:
        return [place for places in by_line for place in places]
    random = Random(seed)
    random.shuffle(by_line)
    return [random.choice(places) for places in by_line]


def attempt(place: Place, tree: Path, known: Tests, budget: float, log: Path) -> Row:
    began = time.monotonic()
    file, change = tree / place.file, place.mutation
    mutant = change.apply(place.source)
    tests = choose(place, known, budget) if compiles(mutant) else []
    outcome, detail = "no test" if compiles(mutant) else "no program", ""
    if tests:
        file.write_bytes(mutant)
        try:
            limit = 3 * sum(known.seconds[test] for test in tests) + _PATIENCE
            code = run_pytest(tests, limit, log)
        finally:
            file.write_bytes(place.source)
        outcome = {0: "survived", None: "hung"}.get(code, "killed")
        if outcome == "killed":
            words = log.read_text(errors="replace")
            found = re.findall(r"^(?:FAILED|ERROR) (\S+)", words, re.MULTILINE)
            detail = found[0] if found else f"exit code {code}"
    seconds = round(time.monotonic() - began, 1)
    return Row(
        place.key, place.file, change.line, place.text, change.old, change.new, outcome, len(tests), seconds, detail
    )


def choose(place: Place, known: Tests, budget: float) -> list[str]:
    """Tests that run the place, for `budget` seconds: the shortest ones of each file of tests, in turn; first of all
    those that run what few run of the lines that follow, since a refusal is tested by them."""
    words = set(re.findall(r"[a-z]+", place.file))
    first = place.mutation.lines[0]
    after = [set(known.of(place.file, line, line)) for line in range(first, place.mutation.lines[1] + 4)]
    rare = min(filter(None, after), key=len, default=set())
    queues: dict[str, list[str]] = defaultdict(list)
    for test in sorted(_tests(place, known), key=lambda test: test not in rare):
        queues[test.partition("::")[0]].append(test)
    random = Random(place.key)
    alike = {file: len(words & set(re.findall(r"[a-z]+", file))) for file in queues}
    order = sorted(queues, key=lambda file: (queues[file][0] not in rare, -alike[file], random.random()))
    chosen: list[str] = []
    left = budget
    while left > 0 and any(queues.values()):
        for file in order:
            if queues[file] and left > 0:
                chosen.append(queues[file].pop(0))
                left -= known.seconds[chosen[-1]]
    return sorted(chosen, key=known.seconds.__getitem__)


def _tests(place: Place, known: Tests) -> list[str]:
    change = place.mutation
    if change.imported and change.lines[0] <= change.line <= change.lines[1]:
        return known.of(place.file, 1, place.source.count(b"\n") + 1)
    if change.imported:  # a default argument
        return known.of(place.file, *change.lines)
    return known.of(place.file, change.line, change.line) or known.of(place.file, *change.lines)
