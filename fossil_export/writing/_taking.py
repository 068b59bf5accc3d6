"""Which staged folder a process works in: one that a dead process left, one that many share, or a new one."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fossil_export.errors import OutputError
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal

_PATIENCE = 2.0
"""Seconds that a part waits for a process that looks whether the folder is a dead one's."""


@dataclass(frozen=True)
class Held:
    """A staged folder and the descriptor by which this process has it; `replaced` as in `Assembly`."""

    folder: Path
    lock: int
    replaced: tuple[str, ...] = ()


def take(output: Path, digest: str, about: Mapping[str, str]) -> Held:
    """A folder that this process has alone: one that a dead process left of the same result, or a new one; what else
    dead processes left is removed. Raises OSError."""
    mine: list[Held] = []  # the new one first
    replaced: tuple[str, ...] = ()
    try:
        best = new = _new(output, mine)
        most = 0
        for leftover in staging.leftovers(output):
            if leftover == new.folder or (lock := staging.hold(leftover)) is None:
                continue
            mine.append(found := Held(leftover, lock))
            journal = Journal(leftover)
            # What another user has put there is not read: a pipe in it would be waited for.
            known = journal.about() if leftover.stat().st_uid == new.folder.stat().st_uid else None
            count = len(journal.notes()) if known is not None else 0
            if known is not None and count and known[0] != digest:
                replaced = differences(known[1], about)
            elif known is not None and count > most:
                best, most, found = found, count, best
            if found is not new:
                mine.remove(found)
                _remove(found)
        if best is new:
            Journal(new.folder).begin(digest, about)
            return Held(new.folder, new.lock, replaced)
        _remove(mine.pop(0))
        return best
    except BaseException:
        for number, held in enumerate(mine):
            if number == 0:
                _remove(held)
            else:  # what others left is of use to the next run
                os.close(held.lock)
        raise


def _new(output: Path, mine: list[Held]) -> Held:
    """A new folder beside `output`, which this process has alone and which is one of `mine`."""
    while True:
        folder = staging.partial_name(output)
        try:
            folder.mkdir()
            lock = staging.claim(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if lock is not None:
            mine.append(Held(folder, lock))
            return mine[-1]


def _remove(held: Held) -> None:
    shutil.rmtree(held.folder, ignore_errors=True)
    os.close(held.lock)


def join(output: Path, digest: str, about: Mapping[str, str]) -> Held:
    """The folder in which processes on any number of machines make parts of `output`; new if there is none. Raises
    OutputError if it is of another result, OSError as the system does."""
    folder = parts_of(output)
    end = time.monotonic() + _PATIENCE
    while (lock := _shared(folder)) is None:
        if time.monotonic() > end:
            raise OutputError(f"{output}: another process merges it alone; wait for that, or end it")
        time.sleep(0.05)
    try:
        journal = Journal(folder)
        if folder.stat().st_uid != _owner_of_new(output):
            raise OutputError(f"{folder}: is another user's; choose another --output")
        known = journal.about()
        if known is None or known[0] == digest:  # it may have ended between two steps
            journal.begin(digest, about)
            known = journal.about()
        if known is None:
            raise OutputError(f"{folder}: holds no journal of parts; remove it, then run all parts again")
        if known[0] != digest:
            told = ", ".join(differences(known[1], about))
            raise OutputError(
                f"{output}: its parts were begun with {told}; give every part the same arguments, inputs and version, "
                f"or remove {folder} and run all parts again"
            )
    except BaseException:
        os.close(lock)
        raise
    return Held(folder, lock)


def parts_of(output: Path) -> Path:
    """The folder in which parts of `output` come together."""
    return output.with_name(f"{staging.hidden(output)}.partial-parts")


def _shared(folder: Path) -> int | None:
    """A descriptor of `folder`, which is made if it is not there, that nobody who wants it alone can have; None if
    another process has it so now."""
    folder.mkdir(exist_ok=True)
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # a file system without locks
        pass
    with suppress(FileNotFoundError):
        if os.path.samestat(folder.stat(), os.fstat(lock)):
            return lock
    os.close(lock)  # whoever had it until now has removed it
    return None


def _owner_of_new(output: Path) -> int:
    """The user whose files are those that this process makes beside `output`: a server may know them by another
    number."""
    probe = staging.partial_name(output)
    probe.mkdir()
    try:
        return probe.stat().st_uid
    finally:
        with suppress(OSError):  # taken for a dead process's, and removed
            probe.rmdir()


def differences(was: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """What differs, in words."""
    names = dict.fromkeys([*now, *was])
    return tuple(
        f"another {name} ({was.get(name, 'none')}, now {now.get(name, 'none')})"
        for name in names
        if was.get(name) != now.get(name)
    ) or ("other inputs",)
