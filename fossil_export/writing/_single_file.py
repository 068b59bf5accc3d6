"""All or nothing for one file: it is written beside its destination and takes that name when it is whole and synced."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fossil_export.writing._staging import claim, hold, leftovers, partial_name, rename_new, sync, sync_name


@contextmanager
def staged_file(output: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield the path of a new, empty file beside `output`, to be written there; then it is synced and takes that name.

    Its name is like no other's, so that several processes may write one `output`: the last one wins, or with
    `overwrite` false the first one does, and the others get FileExistsError. If the block raises nothing appears; what
    a killed process left is removed by the next one. Raises OSError as the system does, and
    OutputError where only the name is in doubt.
    """
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    _remove_dead(output)
    path, lock = _new(output)
    try:
        yield path
        sync(path)
        if overwrite:
            path.replace(output)
        else:
            rename_new(path, output)
        sync_name(output)
    finally:
        with suppress(OSError):  # the next one removes it
            path.unlink(missing_ok=True)
        os.close(lock)


def write_file(output: Path, content: bytes) -> None:
    """Put `content` at `output`, whole or not at all, in the place of what is there. Raises OSError."""
    with staged_file(output) as path:
        path.write_bytes(content)


def _new(output: Path) -> tuple[Path, int]:
    """A new file beside `output`, and a descriptor that holds it for as long as this process lives."""
    while True:
        path = partial_name(output)
        # Never what is there already, be it a link that was put there to be followed.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        if (lock := claim(path)) is not None:
            return path, lock


def _remove_dead(output: Path) -> None:
    """Remove unfinished files of `output` whose process is gone."""
    for leftover in leftovers(output):
        if leftover.is_file() and not leftover.is_symlink() and (lock := hold(leftover)) is not None:
            leftover.unlink(missing_ok=True)
            os.close(lock)
