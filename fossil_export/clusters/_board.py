"""How far each file is: a small actor to which the workers report, and which this process asks."""

from __future__ import annotations

import threading
import time
from typing import Any

EVERY = 0.3
"""Seconds between two reports of a worker."""


def board_class() -> type[Any]:
    """The actor. It is sent as it stands here, and needs this package on no machine."""

    class Board:
        def __init__(self) -> None:
            self.found: dict[str, tuple[int, str, int]] = {}

        def report(self, file: str, attempt: int, node: str, nbytes: int) -> None:
            """That `attempt` to make `file`, at work on the node, has written so many bytes."""
            if file not in self.found or attempt >= self.found[file][0]:
                self.found[file] = (attempt, node, nbytes)

        def take(self) -> dict[str, tuple[int, str, int]]:
            """What is new since the last call."""
            found, self.found = self.found, {}
            return found

    return Board


class Reporter:
    """The worker's side: counts bytes, from any thread, and tells the board now and then."""

    def __init__(self, board: Any, file: str, attempt: int, node: str) -> None:
        self._board = board
        self._about = (file, attempt, node)
        self._lock = threading.Lock()
        self._done = 0
        self._next = time.monotonic() + EVERY

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + EVERY
            self._board.report.remote(*self._about, self._done)


class Reached:
    """This process's side: what was reported becomes calls with bytes that are new. A file that is made again is
    counted from where its last attempt was, so that a bar never goes back."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._shown: dict[str, int] = {}
        self.nodes: dict[tuple[str, int], str] = {}

    def seen(self, found: dict[str, tuple[int, str, int]]) -> None:
        for file, (attempt, node, nbytes) in found.items():
            self.nodes[file, attempt] = node
            self.reached(file, nbytes)

    def reached(self, file: str, nbytes: int) -> None:
        if (more := nbytes - self._shown.get(file, 0)) > 0:
            self._shown[file] = nbytes
            self._progress(more)
