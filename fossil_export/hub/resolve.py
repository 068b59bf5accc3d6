"""The one place where what the user typed becomes a path."""

from __future__ import annotations

from pathlib import Path

from fossil_export.errors import FossilExportError


def resolve(given: str | Path, error: type[FossilExportError], what: str) -> Path:
    """The local file or folder that `given` names; raises `error` when there is none.

    `what` is the word for it in the message ("adapter", "base model").
    """
    path = Path(given).expanduser()
    if not path.exists():
        option = " with --base" if what == "base model" else ""
        raise error(f"{given}: no such file or folder; download the {what} and name its folder{option}")
    return path
