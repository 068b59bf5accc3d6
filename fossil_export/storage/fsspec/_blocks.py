"""Blocks of files elsewhere: each asked for once, several at a time, in bounded memory.

A merge reads a file from its beginning to its end, in pieces of any size and in nearly that order, by several threads.
Whole blocks join what is adjacent into one request; the blocks that follow are asked for before they are needed.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

BLOCK = 4 << 20
"""Bytes of one request."""

CONNECTIONS = 8
"""Requests at a time; botocore keeps 10 connections."""

HELD = 16
"""Blocks in memory, those that are on their way counted."""

READERS = 6
"""Readers at a time; what more of them want at once would not fit, and blocks would go before they are read."""

AHEAD = 6
"""Blocks that are asked for before they are needed."""

Key = tuple[Hashable, int]


class _Block:
    """What is asked for. `wanted` counts readers that have not taken it yet, `awaited` those that wait for it now;
    `used` counts the bytes that were read. After the last of them it is the first to go."""

    __slots__ = ("awaited", "data", "fetch", "is_running", "problem", "used", "wanted")

    def __init__(self, fetch: Callable[[], bytes]) -> None:
        self.fetch = fetch
        self.data: bytes | None = None
        self.problem: BaseException | None = None
        self.is_running = False
        self.wanted = self.awaited = self.used = 0

    @property
    def is_spent(self) -> bool:
        return self.data is not None and self.used >= len(self.data) and not self.wanted

    @property
    def is_done(self) -> bool:
        return self.data is not None or self.problem is not None


class Blocks:
    """What this process reads of files elsewhere. Keys are of a file and the number of a block in it."""

    def __init__(self, connections: int = CONNECTIONS, held: int = HELD) -> None:
        self._blocks: dict[Key, _Block] = {}  # those that were used last stand last
        self._held, self._most = 0, held
        self._changed = threading.Condition()
        self.readers = threading.Semaphore(READERS)
        self._pool = ThreadPoolExecutor(connections, "fossil-export-blocks")
        self.peak = 0

    def read(self, keys: list[Key], ahead: Iterable[Key], fetch: Callable[[Key], bytes]) -> Iterator[bytes]:
        """The blocks `keys`, in order, each one good until the next is asked for. `ahead` are asked for, too, as far as
        there is room for them. Raises what `fetch` raised."""
        with self._changed:
            found = [self._asked(key, fetch) for key in keys]
            for block in found:
                block.wanted += 1
            for key in ahead:
                if key not in self._blocks and self._room() > 0:
                    self._asked(key, fetch)
        try:
            while found:
                yield self._taken(found[0])
                with self._changed:
                    found.pop(0).wanted -= 1
                    self._changed.notify_all()
        finally:
            with self._changed:
                for block in found:
                    block.wanted -= 1
                self._changed.notify_all()

    def spend(self, key: Key, nbytes: int) -> None:
        """Note that so many bytes of a block were read."""
        with self._changed:
            if (block := self._blocks.get(key)) is not None and block.data is not None:
                block.used += nbytes
                if block.is_spent:
                    self._changed.notify_all()

    def forget(self, file: Hashable) -> None:
        """Drop the blocks of a file."""
        with self._changed:
            for key in [key for key, block in self._blocks.items() if key[0] == file and not block.awaited]:
                self._drop(key)
            self._changed.notify_all()

    def _asked(self, key: Key, fetch: Callable[[Key], bytes]) -> _Block:
        block = self._blocks.pop(key, None)
        if block is None or block.problem is not None:
            block = _Block(lambda: fetch(key))
            self._pool.submit(self._bring, key, block)
        self._blocks[key] = block
        return block

    def _taken(self, block: _Block) -> bytes:
        with self._changed:
            block.awaited += 1
            try:
                while not block.is_done:
                    self._changed.wait()
            finally:
                block.awaited -= 1
            if block.problem is not None:
                raise block.problem
            assert block.data is not None
            return block.data

    def _bring(self, key: Key, block: _Block) -> None:
        with self._changed:
            while self._held >= self._most and not self._make_room(key):
                self._changed.wait()
            if self._blocks.get(key) is not block:  # its file was closed
                block.problem = ValueError("read of a closed file")
                self._changed.notify_all()
                return
            self._held += 1
            self.peak = max(self.peak, self._held)
            block.is_running = True
        data = problem = None
        try:
            data = block.fetch()
        except BaseException as found:
            problem = found
        with self._changed:
            block.data, block.problem, block.is_running = data, problem, False
            if self._blocks.get(key) is not block or problem is not None:
                self._held -= 1
                with suppress(KeyError):
                    if self._blocks[key] is block:
                        del self._blocks[key]
            self._changed.notify_all()

    def _room(self) -> int:
        """Blocks that could be asked for and let no other wait."""
        waiting = sum(not block.is_done and not block.is_running for block in self._blocks.values())
        spent = sum(block.is_spent for block in self._blocks.values())
        return self._most - self._held - waiting + spent

    def _make_room(self, wanted: Key) -> bool:
        """Drop the block that is needed least: one that was read to its end, one that no reader has asked for, then one
        whose reader waits for another."""
        done = [(key, block) for key, block in self._blocks.items() if block.data is not None and not block.awaited]
        if not done:
            return False

        def use(one: tuple[Key, _Block]) -> tuple[bool, bool, float]:
            (file, number), block = one
            return block.wanted > 0, not block.is_spent, -abs(number - wanted[1]) if file == wanted[0] else -math.inf

        self._drop(min(done, key=use)[0])
        return True

    def _drop(self, key: Key) -> None:
        block = self._blocks.pop(key)
        if block.data is not None:
            self._held -= 1


_of_process: tuple[int, Blocks] | None = None
_lock = threading.Lock()


def blocks() -> Blocks:
    """Those of this process; one that was forked has none of its parent's threads."""
    global _of_process
    with _lock:
        if _of_process is None or _of_process[0] != os.getpid():
            _of_process = os.getpid(), Blocks()
        return _of_process[1]
