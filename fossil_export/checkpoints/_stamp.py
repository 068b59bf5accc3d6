"""Is a file still the one that was looked at? A base may be synced or replaced while it is merged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fossil_export.errors import CheckpointError, FossilExportError


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written to, cut or replaced: bytes, nanoseconds of its last change, inode, device."""

    size: int
    modified: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Of those files that are here."""
    return {path: Stamp.of(path.stat()) for path in paths if path.is_file()}


def check_stamp(path: Path, stamp: Stamp | None, error: type[FossilExportError] = CheckpointError) -> None:
    """Raise `error` unless the file at `path` has this `stamp`; None stands for a file that was not here to be seen."""
    if stamp is None:
        return
    try:
        same = Stamp.of(path.stat()) == stamp
    except OSError:
        same = False
    if not same:
        raise changed(path, error)


def changed(path: Path, error: type[FossilExportError] = CheckpointError) -> FossilExportError:
    """The error for a file that is not what it was when its header was read."""
    return error(
        f"{path}: changed while it was being read; wait until whatever writes it is done, then run the command again"
    )
