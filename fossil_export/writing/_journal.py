"""What is kept of an unfinished result: what it will be, its finished files, and a note on each of them.

The staged folder has `merge.json`, which says what the result is of; `notes/` with one file of JSON for each finished
one; what is being written, until it is whole; and `result/`, which takes the name of the output in the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.writing._checksum import checksum
from fossil_export.writing._staging import hold, rename_new, sync_folder

_FORMAT = 1
_ABOUT, _NOTES, _RESULT = "merge.json", "notes", "result"
_LONG = 200
_BLOCK = 8 << 20
_LARGEST = 256 << 20
"""Bytes that a file of the journal may have; a note takes some 150 for each merged tensor."""
_AGED = 24 * 3600
"""Seconds after which a file that nobody writes to is a dead process's, where the file system has no locks."""


class Journal:
    """The staged folder `path`; `result` is the folder in it that will be the output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = path / _RESULT
        self._notes = self.path / _NOTES

    def about(self) -> tuple[str, dict[str, str]] | None:
        """Digest of what the result is of, and that by name; None if it does not say. Raises OSError if it cannot be
        read."""
        try:
            found = json.loads(_small_file(self.path / _ABOUT))
            if found["format"] != _FORMAT or not isinstance(found["digest"], str):
                return None
            return found["digest"], {str(key): str(value) for key, value in found["about"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def begin(self, digest: str, about: Mapping[str, str]) -> None:
        """Say what the result is of, unless another process has said it by now. Raises OSError."""
        self._notes.mkdir(exist_ok=True)
        self.result.mkdir(exist_ok=True)
        content = {"format": _FORMAT, "digest": digest, "about": dict(about)}
        new = self._written(json.dumps(content, indent=1, ensure_ascii=False).encode())
        try:
            rename_new(new, self.path / _ABOUT)
        except FileExistsError:
            new.unlink()
        sync_folder(self.path)

    def new_name(self, small: bool = False) -> Path:
        """For a file that is being written, like no other process's: a large one, which its process holds so that
        `clear` can tell, or a small one."""
        return self.path / f"{'small' if small else 'writing'}-{secrets.token_hex(8)}"

    def add(self, name: str, sums: int, about: Mapping[str, Any]) -> None:
        """Note that the file `name` of the result, which has the checksum `sums`, is finished. Raises OSError."""
        status = (self.result / name).stat()
        entry = {
            "file": name,
            "size": status.st_size,
            "checksum": f"{sums:016x}",
            "stamp": [status.st_mtime_ns, status.st_ino],
            "about": dict(about),
        }
        self._written(json.dumps(entry).encode()).replace(self._notes / _note_name(name))
        sync_folder(self._notes)

    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted of each file that is still as it was. Raises OSError."""
        found = {}
        for path in sorted(self._notes.glob("*.json")):
            try:
                entry = json.loads(_small_file(path))
                name, about, sums = entry["file"], dict(entry["about"]), int(entry["checksum"], 16)
                known = path.name == _note_name(name) and self._is_same(name, entry, sums)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError):
                continue  # damaged, or gone: its file is made again
            if known:
                found[name] = about
        return found

    def _is_same(self, name: str, entry: Mapping[str, Any], sums: int) -> bool:
        """Whether a file has the bytes that it had; read if its time or its inode is another (it was copied, say)."""
        path = self.result / name
        if path.is_symlink() or not path.is_file():
            return False
        status = path.stat()
        if status.st_size != entry["size"]:
            return False
        if [status.st_mtime_ns, status.st_ino] == entry["stamp"]:
            return True
        if checksum_of(path) != sums:
            return False
        self.add(name, sums, entry["about"])
        return True

    def clear(self, alone: bool) -> None:
        """Remove what dead processes were writing: large files, or all of it if this process is `alone`."""
        for path in self.path.glob("small-*") if alone else ():
            path.unlink(missing_ok=True)
        for path in self.path.glob("writing-*"):
            lock = hold(path, os.O_RDWR)
            if alone or lock is not None or _is_aged(path):
                path.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)

    def _written(self, content: bytes) -> Path:
        path = self.new_name(small=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path


def checksum_of(path: Path) -> int:
    """Of a whole file. Raises OSError."""
    import numpy as np

    total, offset = 0, 0
    buffer = np.empty(_BLOCK, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer.data):
            total += checksum(buffer[:count], offset)
            offset += count
    return total % (1 << 64)


def _small_file(path: Path) -> bytes:
    """The content of a file of the journal; nothing of what is none, or is too large to be one. Raises OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
        return b""
    return path.read_bytes()


def _note_name(name: str) -> str:
    plain = "/" not in name and not name.startswith(".") and len(os.fsencode(name)) <= _LONG
    return f"{name if plain else hashlib.sha256(name.encode()).hexdigest()}.json"


def _is_aged(path: Path) -> bool:
    """Whether nobody has written to a file for long, on a file system without locks."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return os.fstat(descriptor).st_mtime < time.time() - _AGED
    finally:
        os.close(descriptor)
    return True
