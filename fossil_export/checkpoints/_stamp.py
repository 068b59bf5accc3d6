"""Is a file still the one that was looked at? A base may be synced or replaced while it is merged.

A tool may set the time of a file back after writing to it (`rsync --inplace -t`, `cp -p`); the time of its status
(ctime) cannot be set. That changes with a mode, an owner or another hard link, too, which are no reason to stop: it
counts only where none of those explains it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fossil_export.errors import CheckpointError, FossilExportError


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """What changes when a file is written to, cut or replaced: `file` is bytes, nanoseconds of its last change, inode
    and device, `status` nanoseconds of the last change of anything about it, `others` what else that may have been:
    mode, hard links, owner and group. `status` is None for a file to which this package makes hard links, and takes
    them away again.

    Stamps are equal if they may be of the same bytes.
    """

    file: tuple[int, int, int, int]
    status: int | None
    others: tuple[int, int, int, int]

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(
            (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev),
            status.st_ctime_ns,
            (status.st_mode, status.st_nlink, status.st_uid, status.st_gid),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp):
            return NotImplemented
        known = None not in (self.status, other.status)
        return self.file == other.file and not (known and self.status != other.status and self.others == other.others)

    def __hash__(self) -> int:
        return hash(self.file)


def stamps_of(paths: Iterable[Path], linked: bool = False) -> dict[Path, Stamp]:
    """Of those files that are here; `linked` where other runs of this package may make hard links to them."""
    found = {path: Stamp.of(path.stat()) for path in paths if path.is_file()}
    return {path: replace(stamp, status=None) for path, stamp in found.items()} if linked else found


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
