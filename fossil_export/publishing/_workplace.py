"""The folder in which a streamed merge has the file at hand and its journal: one for each merge, held while it runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fossil_export.checkpoints._checkpoint import identity, sha256
from fossil_export.errors import OutputError
from fossil_export.publishing._moves import StreamPlan
from fossil_export.publishing._repository import Repository
from fossil_export.storage import expanded
from fossil_export.version import __version__

JOURNAL = "journal.json"
BASE = "base"
MERGING = "merging"


@contextmanager
def workplace(plan: StreamPlan, repository: Repository, cache_dir: str | Path | None) -> Iterator[Path]:
    """This merge's own folder, held for as long as it runs. Raises OutputError for want of room or permission.

    It stays where an error leaves something in it that the next run can use; the caller removes it after success.
    """
    root = expanded(cache_dir, OutputError) if cache_dir is not None else _default_cache()
    folder = root.absolute() / "stream" / _key(plan, repository)
    try:
        lock = _held(folder)
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be written: {problem.strerror}; choose another --cache-dir") from problem
    try:
        check_room(folder, max((move.disk for move in plan.moves), default=0))
        yield folder
    finally:
        if not _is_of_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_room(folder: Path, needed: int) -> None:
    """Raise OutputError unless so many bytes find room in `folder`, whose content is used or removed."""
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if free < needed:
        raise OutputError(
            f"{folder}: takes {needed:,} bytes at once, {free:,} are free; make room, or work elsewhere with "
            "--cache-dir"
        )


def _held(folder: Path) -> int:
    """The lock on `folder`, which is made; it ends with the process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            os.close(lock)
            raise OutputError(f"{folder}: the same merge is running already; wait for it") from problem
        except OSError:
            return lock  # a file system that knows no locks
        try:
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # whoever held it until now has removed the folder


def _is_of_use(folder: Path) -> bool:
    """Whether the next run can go on from something in it."""
    if (folder / JOURNAL).exists():
        return True
    fetched = (path for path in (folder / BASE).rglob("*") if path.is_file() and not path.is_symlink())
    return any(path.suffix == ".incomplete" or ".cache" not in path.relative_to(folder).parts for path in fetched)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fossil-export"


def _key(plan: StreamPlan, repository: Repository) -> str:
    """Tells this merge to this place from every other one."""
    merge = plan.merge
    what = {
        "version": __version__,
        "to": [repository.repo_id, repository.revision or "main", repository.create_pr],
        "base": [merge.base_name, merge.base_revision, identity(merge.base)],
        "times": [] if plan.remote is not None else [header.path.stat().st_mtime_ns for header in merge.base.files],
        "adapters": [
            [weight, *(sha256(path) for path in adapter.files)]
            for adapter, weight in zip(merge.adapters, merge.weights, strict=True)
        ],
        "files": [[file.name, file.size, hashlib.sha256(file.header).hexdigest()] for file in merge.files],
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
