"""Regular expressions that come with a file, matched within bounds.

One like `(a+)+$` takes a time that doubles with each letter. `re` cannot be told when to stop, so that a pattern which
may take long is matched by another process, which is ended then. The meaning is that of `re` in both cases.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from functools import lru_cache
from typing import Any

LONGEST = 1_000_000
STEPS = 1_000_000
"""Of one match in this process, at most; some ten milliseconds."""

SECONDS = 3.0
"""In all, for the matches in the other process; for those in this one ten times as many. Each match adds a little, so
that a process which matches for days comes to no end of it."""

_EACH = 0.0002

START = 30.0

Groups = tuple[str | None, ...]
"""What the groups of a match hold."""

_HELPER = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
known = []
print(flush=True)
for line in sys.stdin:
    number, text, how = json.loads(line)
    if number == len(known):
        known.append(re.compile(text))
    else:
        found = getattr(known[number], how)(text)
        print(json.dumps(found and [found.groups()]), flush=True)
"""


class PatternError(ValueError):
    """Why a pattern cannot be used, as a part of a line that names where it stands."""


class Pattern:
    """`text` between `before` and `after`, which are ours. Raises PatternError if it is none."""

    def __init__(self, text: str, before: str, after: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"is a regular expression of {len(text)} characters; at most {LONGEST:,} are read")
        try:
            self._compiled = re.compile(f"{before}{text}{after}")
        except (re.error, OverflowError, RecursionError, MemoryError, TypeError) as problem:
            raise PatternError(f"is not a valid regular expression: {problem}") from problem
        self._text = text
        self._choices, self._repeats = _effort(text)
        self._repeats += len(re.findall(r"[*+]", before))
        self._left = 10 * SECONDS

    def match(self, name: str) -> Groups | None:
        """The groups of a match that begins with the name; None if there is none. Raises PatternError if that takes too
        long."""
        return self._found(name, "match")

    def fullmatch(self, name: str) -> Groups | None:
        """The same for one that ends with it, too."""
        return self._found(name, "fullmatch")

    def _found(self, name: str, how: str) -> Groups | None:
        steps = self._choices * (len(name) + 1) ** min(self._repeats, 50)
        if steps <= STEPS:
            began = time.perf_counter()
            found = getattr(self._compiled, how)(name)
            self._left = min(self._left + _EACH, 10 * SECONDS) - (time.perf_counter() - began)
            if self._left < 0:
                raise PatternError("takes too long to match so many names; write it without repetitions")
            return None if found is None else found.groups()
        return _helper().match(self._compiled.pattern, name, how)


@lru_cache(maxsize=4096)
def pattern_of(text: str, before: str = "", after: str = "") -> Pattern:
    """The same pattern for the same words, compiled once."""
    return Pattern(text, before, after)


def _effort(text: str) -> tuple[int, int]:
    """How often a matcher may have to choose, at most: among so many ways, and among lengths so many times.

    Read off the characters: what is escaped or in brackets chooses nothing. A group that is repeated, and a reference
    to a group, count as too much; and so do comments, in which a bracket is none.
    """
    if re.search(r"\(\?(?:#|[a-wyzA-Z]*x)", text):
        return 1, 50
    plain = re.sub(r"\\[1-9]|\(\?P=", "({9", text)
    plain = re.sub(r"\\.", "a", plain, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    plain = re.sub(r"\(\?[^()|*+]?", "(", plain)
    optional = len(re.findall(r"(?<![*+?}(])\?", plain))
    repeats = len(re.findall(r"[*+{]", plain)) + 50 * len(re.findall(r"\)[*+{]|\{9", plain))
    choices = 2 ** min(optional, 50)
    depth, alternatives = 0, [1]
    for one in plain:
        if one == "(":
            depth += 1
            alternatives.append(1)
        elif one == ")" and depth:
            depth -= 1
            choices = min(choices * alternatives.pop(), 1 << 60)
        elif one == "|":
            alternatives[-1] += 1
    for left in alternatives:
        choices *= left
    return choices * max(1, len(text) // 1000), repeats


class _Helper:
    """A process that matches, and is ended when it takes too long."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _HELPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError as problem:
            raise PatternError(f"may take long to match, and no process could be started for it ({problem})") from None
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._known: dict[str, int] = {}
        self._waited, self._calls = 0.0, 0
        atexit.register(self._process.kill)
        self._line(START)  # so that its start is not counted

    @property
    def is_ours(self) -> bool:
        """Not ended, and not that of the process which this one was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def match(self, pattern: str, name: str, how: str) -> Groups | None:
        with self._lock:
            began = time.monotonic()
            patience = min(SECONDS, SECONDS + 0.001 * self._calls - self._waited)
            answer = self._asked(pattern, name, how, patience)
            self._waited += time.monotonic() - began
            self._calls += 1
        if not answer:
            self._process.kill()
            self._process.wait()
            raise PatternError(
                f"takes more than {SECONDS:.0f} seconds or too much memory to match; write it without repetitions "
                "within repetitions"
            )
        found: list[Any] | None = json.loads(answer)
        return None if found is None else tuple(found[0])

    def _asked(self, pattern: str, name: str, how: str, patience: float) -> bytes:
        if pattern not in self._known:
            self._known[pattern] = len(self._known)
            self._send(self._known[pattern], pattern, how)
        self._send(self._known[pattern], name, how)
        return self._line(patience)

    def _line(self, patience: float) -> bytes:
        """What it answers; nothing if that takes longer, or it has ended."""
        assert self._process.stdout is not None
        end, found = time.monotonic() + patience, b""
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            more = self._process.stdout.read(1 << 16) if ready else b""
            if not more:
                return b""
            found += more
        return found

    def _send(self, number: int, value: str, how: str) -> None:
        assert self._process.stdin is not None
        try:
            left = memoryview(json.dumps([number, value, how]).encode() + b"\n")
            while left:
                left = left[self._process.stdin.write(left) :]
        except OSError:  # it has ended; there will be no answer
            pass


_running: list[_Helper] = []
_starting = threading.Lock()


def _helper() -> _Helper:
    with _starting:
        if not _running or not _running[-1].is_ours:
            _running[:] = [_Helper()]
        return _running[-1]
