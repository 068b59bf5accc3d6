"""Folders for temporary files that go with the process: at once if it ends by itself, with the next one if it was
killed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fossil_export.writing._staging import claim, hold

_PREFIX = "fossil-export-scratch-"

_open: set[weakref.finalize[..., Scratch]] = set()


class Scratch:
    """A new empty folder `path` in `place` (the system's for temporary files); it goes with `close`, or with this
    object. Raises OSError."""

    def __init__(self, place: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if place is None else place
        _remove_dead(place)
        lock = None
        while lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            lock = claim(self.path)
        self._gone = weakref.finalize(self, _remove, self.path, lock)
        _open.add(self._gone)

    def close(self) -> None:
        self._gone()
        _open.discard(self._gone)


def close_all() -> None:
    """Remove all that this process still has, which is about to end without its exit handlers."""
    while _open:
        _open.pop()()


@contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """The path of a new empty folder, as long as the block runs. Raises OSError, also where it cannot be removed from
    a `place` that is not the system's: what is left there would become a part of the output."""
    scratch = Scratch(place)
    try:
        yield scratch.path
    finally:
        scratch.close()
    if place is not None and scratch.path.exists():
        shutil.rmtree(scratch.path)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_dead(place: Path) -> None:
    """Remove folders of this user's processes that are gone."""
    for leftover in place.glob(f"{_PREFIX}*"):
        try:
            status = leftover.lstat()
        except OSError:  # gone by now
            continue
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if is_ours and (lock := hold(leftover)) is not None:
            _remove(leftover, lock)
