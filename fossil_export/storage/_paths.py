"""Paths on this machine, as the user typed them."""

from __future__ import annotations

import os
from pathlib import Path

from fossil_export.errors import FossilExportError, unreadable


def resolve(given: str | Path, error: type[FossilExportError], what: str) -> Path:
    """The local file or folder that `given` names; raises `error` when there is none or it may not be read."""
    path = expanded(given, error)
    if not exists(path, given, error):
        raise error(nothing_there(given, what))
    return path


def expanded(given: str | Path, error: type[FossilExportError]) -> Path:
    """`given` with `~` replaced. Raises `error` for a path that cannot be written down or a user that is not there."""
    try:
        str(given).encode()  # it will stand in JSON files
        if given == "":
            raise ValueError("it is empty")
        return Path(given).expanduser()
    except (RuntimeError, ValueError) as problem:
        raise error(f"{str(given)!a}: is no usable path: {problem}") from problem


def is_path(name: str) -> bool:
    """Whether there is such a file or folder."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def nothing_there(given: str | Path, what: str) -> str:
    """The message for a name that nothing was found by."""
    option = " with --base" if what == "base model" else ""
    return f"{given}: no such file or folder; download the {what} and name its folder{option}"


def exists(path: Path, given: str | Path, error: type[FossilExportError]) -> bool:
    """Raises `error` for a path that exists and may not be read."""
    try:
        found = path.exists()
        readable = not found or os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
    except OSError as problem:
        raise error(unreadable(given, problem)) from problem
    except ValueError as problem:
        raise error(f"{given}: is no usable path: {problem}") from problem
    if found and not path.is_dir() and not path.is_file():  # to read a pipe would be to wait
        raise error(f"{given}: is neither a file nor a folder; name the file itself")
    if not readable:
        raise error(f"{given}: cannot be read: Permission denied; change its permissions")
    return found
