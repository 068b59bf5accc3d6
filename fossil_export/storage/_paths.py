"""Paths on this machine, as the user typed them."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

from fossil_export.errors import FossilExportError, unreadable

_WORD = re.compile(r"[\w-][\w.-]*")
_ONE_SLASH = re.compile(r"(s3a?|gc?s|az|abfss?|hf|https?|hdfs|sftp|oss):/(?!/)")
_MOST = 5000
"""Names in a folder that are looked at for one like a name that is not there."""


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
    text = str(given)
    if link := _dead_link(text):
        return f"{text}: {link} is a link to {link.readlink()}, and nothing is there; name the {what} itself{option}"
    if near := near_to(text):
        return f"{text}: no such file or folder{_here(text)}; did you mean {near}?"
    if _WORD.fullmatch(text) and isinstance(given, str):
        return f"{text}: no such file or folder here; name the folder{option}, or a model on the Hub as user/{text}"
    if match := _ONE_SLASH.match(text):
        return f"{text}: no such file or folder here; an address has two slashes: {match[1]}://{text[match.end() :]}"
    return f"{text}: no such file or folder; download the {what} and name its folder{option}"


def near_to(given: str) -> str | None:
    """What is here and has nearly the name `given`, as it may be typed; None if nothing has."""
    from difflib import get_close_matches

    try:
        path = Path(given).expanduser()
        missing = next(one for one in (*reversed(path.parents), path) if not one.exists())
        names = [one.name for one in islice(missing.parent.iterdir(), _MOST) if not one.name.startswith(".")]
        names = [name for name in names if name != missing.name]  # a link to nothing is here, and does not help
        (name,) = get_close_matches(missing.name, names, 1, 0.75)
        found = missing.with_name(name)
        whole = found / path.relative_to(missing)
        return str(whole if whole.exists() else found)
    except (OSError, RuntimeError, StopIteration, ValueError):
        return None


def _dead_link(given: str) -> Path | None:
    """The part of a path that ends it: a link whose target is gone, or that leads to itself."""
    try:
        path = Path(given).expanduser()
        missing = next(one for one in (*reversed(path.parents), path) if not one.exists())
        return missing if missing.is_symlink() else None
    except (OSError, RuntimeError, StopIteration, ValueError):
        return None


def _here(text: str) -> str:
    return "" if text.startswith(("/", "~")) else " here"


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
