"""The one place where what the user typed becomes a path."""

from __future__ import annotations

import os
from pathlib import Path

from fossil_export.errors import FossilExportError


def resolve(given: str | Path, error: type[FossilExportError], what: str) -> Path:
    """The local file or folder that `given` names; raises `error` when there is none or it may not be read.

    `what` is the word for it in the message ("adapter", "base model").
    """
    path = expanded(given, error)
    try:
        found = path.exists()
        readable = not found or os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
    except (OSError, ValueError) as problem:
        raise error(f"{given}: is no usable path: {problem}") from problem
    if not found:
        option = " with --base" if what == "base model" else ""
        raise error(f"{given}: no such file or folder; download the {what} and name its folder{option}")
    if not readable:
        raise error(f"{given}: cannot be read: Permission denied; change its permissions")
    return path


def expanded(given: str | Path, error: type[FossilExportError]) -> Path:
    """`given` with `~` replaced. Raises `error` for a path that cannot be written down or a user that is not there."""
    try:
        str(given).encode()  # it will stand in JSON files
        return Path(given).expanduser()
    except (RuntimeError, UnicodeEncodeError) as problem:
        raise error(f"{os.fsencode(given)!r}: is no usable path: {problem}") from problem
