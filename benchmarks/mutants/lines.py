"""Which test runs which line, and how long it takes: one JSON file for each file of tests, kept until that changes, or
a source that it runs."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import coverage
import pytest

from mutants.warm import PACKAGE, run_pytest

SCOPE = ("merging", "methods", "adapters", "checkpoints", "writing", "verifying")
# They speak to a Hub, run real models or write pages: slow, and about other code.
PASSED_OVER = [
    "architectures",
    "card",
    "examples",
    "gpu",
    "hub",
    "install",
    "loopback",
    "onnx_benchmark",
    "onnx_real",
    "push",
    "readme",
    "report",
    "sweep",
    "xet",
]
SLOW = 8  # seconds, after which a test is stopped and not used
FILE_SECONDS = 900


@dataclass(frozen=True)
class Tests:
    """`lines[file][line]` are the tests that run it; `seconds[test]` is what each takes."""

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def of(self, file: str, first: int, last: int) -> list[str]:
        """Those that run a line of these, the shortest first."""
        found = {test for line in range(first, last + 1) for test in self.lines.get(file, {}).get(line, ())}
        return sorted(found, key=self.seconds.__getitem__)


def record(tree: Path, tests: list[Path], folder: Path) -> None:
    """Run these files of tests, but those whose record is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in tests:
        if _kept(path, folder, tree) is not None:
            continue
        for old in folder.glob(f"{path.stem}.*"):
            old.unlink()
        began = time.monotonic()
        code = run_pytest(
            [str(path), "-o", "addopts=", "--maxfail=1000"],
            FILE_SECONDS,
            folder / f"{path.stem}.log",
            (Recorder(tree, _target(path, folder)),),
        )
        print(f"{path.stem}: {time.monotonic() - began:.0f} s, exit code {code}", file=sys.stderr)


def read(tests: list[Path], folder: Path, tree: Path) -> Tests:
    lines: dict[str, dict[int, list[str]]] = {}
    seconds: dict[str, float] = {}
    for path in tests:
        found = _kept(path, folder, tree)
        if found is None:
            continue
        names = list(found["seconds"])
        seconds |= found["seconds"]
        for file, numbers in found["lines"].items():
            into = lines.setdefault(file, {})
            for number, indices in numbers.items():
                into.setdefault(int(number), []).extend(names[index] for index in indices)
    return Tests(lines, seconds)


def files_of_tests(folder: Path, only: str = "") -> list[Path]:
    found = [path for path in sorted(folder.glob("test_*.py")) if re.search(only, path.stem)]
    return [path for path in found if not any(path.stem.startswith(f"test_{word}") for word in PASSED_OVER)]


def _target(path: Path, folder: Path) -> Path:
    return folder / f"{path.stem}.{_digest(path)}.json"


def _kept(path: Path, folder: Path, tree: Path) -> dict[str, Any] | None:
    """The record of a file of tests; None if there is none, or not of these sources."""
    target = _target(path, folder)
    if not target.exists():
        return None
    found: dict[str, Any] = json.loads(target.read_text())
    return found if all(_digest(tree / file) == digest for file, digest in found["sources"].items()) else None


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else ""


class Recorder:
    """A plugin of pytest's: coverage with a context for each test that passes."""

    def __init__(self, tree: Path, target: Path) -> None:
        self._tree, self._target = tree, target
        include = [f"{tree / PACKAGE / name}/*" for name in SCOPE]
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=include)
        self._seconds: dict[str, float] = {}
        self._bad: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        self._coverage.switch_context(item.nodeid)
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(SLOW)
        began = time.monotonic()
        try:
            return (yield)
        finally:
            signal.alarm(0)
            self._seconds[item.nodeid] = round(time.monotonic() - began, 3)
            self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self._bad.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data, good = self._coverage.get_data(), [name for name in self._seconds if name not in self._bad]
        index = {name: number for number, name in enumerate(good)}
        lines: dict[str, dict[int, list[int]]] = {}
        for file in data.measured_files():
            by_line = data.contexts_by_lineno(file).items()
            found = {line: [index[name] for name in names if name in index] for line, names in by_line}
            lines[str(Path(file).relative_to(self._tree))] = {line: tests for line, tests in found.items() if tests}
        seconds = {name: self._seconds[name] for name in good}
        sources = {file: _digest(self._tree / file) for file in lines}
        self._target.write_text(json.dumps({"sources": sources, "seconds": seconds, "lines": lines}))


def _stop(number: int, frame: object) -> None:
    raise TimeoutError(f"a test took longer than {SLOW} s")
