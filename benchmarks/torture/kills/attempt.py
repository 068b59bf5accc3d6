"""One kill, what it left, the next run, and what that one left."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import statistics
from collections import deque
from pathlib import Path
from random import Random

from fossil_export.writing._journal import Journal
from torture.kills.hub import Hub
from torture.kills.process import Ended, modules, preload, run
from torture.kills.scene import TAKEN_UP, Case
from torture.rows import Row

Content = dict[str, str]
"""SHA-256 by path; of a folder "/"."""

EXPECTED = {signal.SIGINT: (130, "Aborted!\n"), signal.SIGTERM: (143, ""), signal.SIGKILL: (-signal.SIGKILL, "")}
TRIES = 30


def content(path: Path) -> Content:
    if not os.path.lexists(path):
        return {}
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    found = {}
    for one in sorted(path.rglob("*")):
        name = str(one.relative_to(path))
        found[name] = "/" if one.is_dir() else hashlib.sha256(one.read_bytes()).hexdigest()
    return found | {"/": "/"}


class Bench:
    """A case at a place (`folder`, with `inputs`), measured and ready: `whole` is what an undisturbed run makes."""

    def __init__(self, case: Case, folder: Path, inputs: Path, hub: Hub, repos: str) -> None:
        self.case = case
        self._run, self._inputs, self._hub, self._repos = folder / "run", inputs, hub, repos
        self._made = 0
        self._old: Path | None = None
        self.old: Content = {}
        self._fresh()
        preload(modules(self._arguments(), self._run))
        if case.replaces:
            self._old = folder / f"old-{case.name.replace(' ', '')}"
            older = [part.replace("/miss", "/older") for part in self._arguments()]
            self._undisturbed(older)
            shutil.copytree(self._run / "out", self._old)
            self.old = content(self._old)
        self._lasted = deque[float](maxlen=5)
        for _ in range(3):
            self._fresh()
            self._lasted.append(self._undisturbed(self._arguments()).seconds)
            self.whole = self._there()

    @property
    def seconds(self) -> float:
        """Of an undisturbed run, as the last ones were: the machine may have other work."""
        return statistics.median(self._lasted)

    def attempt(self, place: str, number: signal.Signals, name: str, seed: int) -> Row:
        random = Random(f"{name} {place} {seed}")
        for late in range(TRIES):  # noqa: B007
            self._fresh()
            lasts = self.seconds
            after = random.uniform(0, lasts)
            ended = run(self._arguments(), self._run, number, after)
            if ended.status != 0:
                break
            self._lasted.append(ended.seconds)
        else:
            return Row("kills", name, place, seed, "late", "never in time")
        outcome, detail = self._outcome(ended, number)
        said = f"after {after:.3f} of {lasts:.3f} s; {late} were late; {detail}"
        return Row("kills", name, place, seed, outcome, said[:1500])

    def _outcome(self, ended: Ended, number: signal.Signals) -> tuple[str, str]:
        status, word = EXPECTED[number]
        if ended.words == "stuck":
            return "stuck", ""
        if (ended.status, ended.words) != (status, word):
            return "word", f"{ended.status}: {ended.words}"
        there = self._there()
        if there == self.whole:
            outcome = "whole"
        elif self.case.replaces and there == self.old:
            outcome = "old"
        elif there in ({}, {".gitattributes": there.get(".gitattributes")}):
            outcome = "lost" if self.case.replaces else "nothing"
        else:
            return "half", str(_difference(there, self.whole))
        remains = self._left()
        if outcome == "lost":
            outcome = "aside" if any(".replaced-" in one for one in remains) else "lost"
        finished = self._finished()  # what is kept of a merge on purpose
        if number != signal.SIGKILL and remains and not finished and self.case.output is not None and outcome != "lost":
            outcome = "remains"
        if outcome == "lost":
            return outcome, str(remains)
        if outcome == "whole" and self.case.output is not None and not self.case.replaces:
            # Such a command refuses what is there; only what was left beside it must go.
            output = self._run / self.case.output
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        again = run(self._arguments(), self._run)
        if not finished:  # else it had less to do than an undisturbed run
            self._lasted.append(again.seconds)
        if again.status or self._there() != self.whole:
            why = again.words[-600:] if again.status else str(_difference(self._there(), self.whole))
            return "other", f"after {outcome}, {remains}: {again.status} {why}"
        if left := self._left():
            return "left", f"{left}, of {remains}"
        if twice := sorted(name for name, number in finished.items() if self._inode(name) != number):
            return "twice", f"after {outcome}: {twice}"
        return outcome, f"{len(finished)} {TAKEN_UP}; {remains}"

    def _finished(self) -> dict[str, int]:
        """Inodes of the files that a killed merge had finished, by name."""
        found: dict[str, int] = {}
        for folder in self._run.glob(".out.partial-*"):
            journal = Journal(folder)
            found |= {name: (journal.result / name).stat().st_ino for name in journal.notes()}
        return found

    def _inode(self, name: str) -> int:
        return (self._run / "out" / name).stat().st_ino

    def _undisturbed(self, arguments: list[str]) -> Ended:
        ended = run(arguments, self._run)
        if ended.status or self._left():
            raise RuntimeError(f"{' '.join(arguments)}: {ended}, left {self._left()}")
        return ended

    def _arguments(self) -> list[str]:
        return self.case.arguments(self._inputs, self._run, self._repo)

    def _fresh(self) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir()
        self._made += 1
        self._repo = f"ada/{self._repos}-{self._made}"
        if self._old is not None:
            shutil.copytree(self._old, self._run / "out")

    def _there(self) -> Content:
        if self.case.output is None:
            return self._hub.files(self._repo)
        return content(self._run / self.case.output)

    def _left(self) -> list[str]:
        """Files and folders that are no result."""
        output = None if self.case.output is None else self._run / self.case.output
        empty = {self._run / "tmp", self._run / "cache", self._run / "cache" / "stream"}
        return sorted(
            str(one.relative_to(self._run))
            for one in self._run.rglob("*")
            if one not in empty and one != output and output not in one.parents
        )


def _difference(one: Content, other: Content) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))[:8]
