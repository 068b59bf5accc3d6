"""All or nothing: a folder is built beside its destination and appears there only when complete and synced."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.errors import OutputError, reason

_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR}
"""What file systems say that sync files, but no folders."""

_LONG = 200
"""Bytes of a name; systems take 255, and encrypting ones fewer."""


def check_destination(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raise OutputError unless `output` may be created (or replaced) without touching any of `inputs`."""
    target = Path(os.path.realpath(output))  # Path.resolve raises for links in a circle, which are told below
    for source in inputs:
        place = source.resolve()
        folder = place if place.is_dir() else place.parent
        if target == folder or folder in target.parents:
            inside = source if place.is_dir() else source.parent
            what = "is an input" if target == folder else f"lies inside {inside}"
            raise OutputError(f"{output}: {what}, which is only read; choose another --output")
        if target in folder.parents:
            raise OutputError(f"{output}: holds {source}, which would be replaced; choose another --output")
    try:
        if not os.path.lexists(output):
            return
        if output.is_symlink() or not output.is_dir():
            raise OutputError(f"{output}: exists and is not a folder; choose another --output")
        if not any(output.iterdir()):
            return
    except OSError as problem:
        raise OutputError(f"{output}: cannot be used: {reason(problem)}; choose another --output") from problem
    if not overwrite:
        raise OutputError(f"{output}: exists already; choose another --output or add --overwrite")
    if not (output / PROVENANCE).is_file():
        raise OutputError(
            f"{output}: exists and was not written by fossil-export (no {PROVENANCE} in it); "
            "--overwrite replaces only its own folders, remove this one yourself"
        )


@contextmanager
def staged_folder(output: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """Yield a new hidden folder beside `output`; when the block ends well it is synced and takes that name.

    If the block raises, or the process dies, nothing appears under the name; what a dead process left is
    removed by the next one that stages the same `output`. `needed` is in bytes, checked against the free
    space first. Only with `overwrite` does it take the place of a folder that is there by then. Raises
    OutputError for want of room or permission.
    """
    made = make_parents(output.parent)
    folder = lock = None
    try:
        try:
            with contextlib.suppress(FileNotFoundError):
                output.lstat()  # a name too long is told before the work
            _remove_dead(output)
            check_room(output, needed)
            while lock is None:
                folder = partial_name(output)
                folder.mkdir()
                lock = claim(folder)
        except OSError as problem:
            raise unwritable(output, problem) from problem
        assert folder is not None
        yield folder
        try:
            sync_tree(folder)
            publish(folder, output, overwrite)
        except OSError as problem:
            raise unplaced(output, problem) from problem
        made = []
        sync_name(output)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        remove_empty(made)


def check_room(output: Path, needed: int) -> None:
    """Raise OutputError unless `needed` bytes find room beside `output`; OSError as the system does."""
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise OutputError(
            f"{output}: needs {needed:,} bytes, {output.parent} has {free:,} free; make room or choose another disk"
        )


def unwritable(output: Path, problem: OSError) -> OutputError:
    """The error for an output that cannot be begun."""
    return OutputError(f"{output}: cannot be written: {reason(problem)}; choose another --output")


def unplaced(output: Path, problem: OSError) -> OutputError:
    """The error for one that is complete, and cannot have its name."""
    return OutputError(f"{output}: cannot be put in place: {reason(problem)}; choose another --output")


def partial_name(output: Path) -> Path:
    """A name beside `output` for what is not finished, like no other process's."""
    return output.with_name(f"{hidden(output)}.partial-{secrets.token_hex(4)}")


def leftovers(output: Path, kind: str = "partial") -> Iterator[Path]:
    """What such names are given to now."""
    return output.parent.glob(f"{escape(hidden(output))}.{kind}-*")


def hidden(output: Path) -> str:
    """The beginning of hidden names of `output`: its own name, or of a long one, to which nothing can be added, a part
    and a digest."""
    name = os.fsencode(output.name)
    if len(name) <= _LONG:
        return f".{output.name}"
    beginning = name[: _LONG - 20].decode(errors="ignore")
    return f".{beginning}-{hashlib.sha256(name).hexdigest()[:16]}"


def make_parents(folder: Path) -> list[Path]:
    """Create `folder` and return the levels that were new, innermost first."""
    missing: list[Path] = []
    made: list[Path] = []
    wanted = folder
    try:
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for level in reversed(missing):
            if not level.is_dir():  # it may be there by now: "new/.." with the one before it
                level.mkdir()
                made.insert(0, level)
    except OSError as problem:
        remove_empty(made)
        raise OutputError(f"{wanted}: cannot be created: {reason(problem)}; choose another --output") from problem
    return made


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            break


_AT_ONCE = 16
# Files that are synced at the same time.


def claim(path: Path) -> int | None:
    """Hold a file or folder that this process has just made; None where another one took it for a dead process's
    first, and removed it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)
    return None


def hold(path: Path, mode: int = os.O_RDONLY) -> int | None:
    """Hold a file or folder as long as the descriptor is open; None where another process has it, the file system
    knows no locks, or the name is somebody's link or out of reach. A file on NFS is held only if it is opened for
    writing."""
    try:
        # Not for long: a pipe of that name would wait for its other end.
        descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_dead(output: Path) -> None:
    """Remove staged folders of `output` whose process is gone; give back a folder it had set aside."""
    for leftover in leftovers(output):
        if (lock := hold(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    give_back(output)


def give_back(output: Path) -> None:
    """Give `output` the folder back that a dead process had set aside. Raises OSError."""
    for leftover in leftovers(output, "replaced"):
        if os.path.lexists(output):
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        try:
            leftover.rename(output)
        except OSError:  # its process lives, and went on; or another one was faster
            if leftover.exists() and not os.path.lexists(output):
                raise


def publish(folder: Path, output: Path, overwrite: bool) -> None:
    """Give `folder`, which is synced, the name `output`; with `overwrite` in the place of a result that is there, which
    then has the name of `folder`, or is gone. Raises OSError."""
    # What is there is looked at again: it may have come while the merge ran.
    if overwrite and (output / PROVENANCE).is_file():
        if _exchange(folder, output):
            return  # the old folder now has the staged name and is removed with it
        aside = output.with_name(f"{hidden(output)}.replaced-{secrets.token_hex(4)}")
        output.rename(aside)
        try:
            folder.rename(output)
        except OSError:
            if not os.path.lexists(output):
                aside.rename(output)
            else:  # another process was faster, and its folder is as good
                shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_name(output)
        shutil.rmtree(aside, ignore_errors=True)
        return
    folder.rename(output)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    return _renameat2(first, second, 2)  # RENAME_EXCHANGE


def rename_new(first: Path, second: Path) -> None:
    """Give the file `first` the name `second`, which nothing has yet; raises FileExistsError where something does."""
    if _renameat2(first, second, 1):  # RENAME_NOREPLACE
        return
    try:
        os.link(first, second)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(second):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(second)) from None
        first.rename(second)
        return
    first.unlink()


def _renameat2(first: Path, second: Path, flags: int) -> bool:
    """Rename as Linux's renameat2 does; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd = -100
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
        return False
    raise OSError(code, os.strerror(code))


def sync_tree(folder: Path) -> None:
    paths = [Path(root) / name for root, _, files in os.walk(folder) for name in files]
    # Each waits for the disk: thousands of small files take as long as their number, one by one.
    with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(paths)))) as pool:
        for _ in pool.map(sync, paths):
            pass
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))


def sync_name(output: Path) -> None:
    """See to it that the name, which `output` has got, outlasts a crash of the machine. Raises OutputError."""
    try:
        sync_folder(output.parent)
    except OSError as problem:
        raise OutputError(
            f"{output}: is written, but may be lost if the machine goes down, since {output.parent} cannot be synced: "
            f"{reason(problem)}; check its disk"
        ) from problem


def sync_folder(folder: Path) -> None:
    try:
        sync(folder)
    except PermissionError:  # one that may be written to and not read
        return
    except OSError as problem:
        if problem.errno not in _NO_SYNC:
            raise


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
