"""What is used of the Hub's client beyond its public functions; no other file of the package may.

Each of these is looked for before it is used: another version may have it no more, or under another name.
"""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from typing import Any

from fossil_export.errors import HubError

FLOOR, ABOVE = (1, 23), (3, 0)
SUPPORTED = f"huggingface-hub>={FLOOR[0]}.{FLOOR[1]},<{ABOVE[0]}"
"""The versions that the tests are run with, at both ends."""

LIBRARY = "fossil-export"
"""What the client is told to send as the name of whoever uses it."""

LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx", "httpx2")
"""Loggers that are told signed addresses. The client's 1.x speaks through httpx, its 2.x through httpx2."""

_MODE, _IGNORED, _UPLOADED, _REMOTE = "_upload_mode", "_should_ignore", "_is_uploaded", "_remote_oid"
"""Where an addition (CommitOperationAdd) keeps what became of its upload."""


def check_version() -> None:
    """Raise HubError for a client that was not there when this was written, or no longer: pip lets one be put here."""
    found = re.match(r"(\d+)\.(\d+)", version("huggingface_hub"))
    if found is None or not FLOOR <= (int(found[1]), int(found[2])) < ABOVE:
        raise _unknown("too old or too new")


def check_additions() -> None:
    """Raise HubError where the client's additions are others than those known here; to be called before any upload."""
    from huggingface_hub import CommitOperationAdd

    known = {field.name for field in fields(CommitOperationAdd)}
    if missing := [name for name in (_MODE, _IGNORED, _UPLOADED, _REMOTE) if name not in known]:
        raise _unknown(f"CommitOperationAdd has no {', '.join(missing)}")


def is_large(addition: Any) -> bool:
    """Whether the Hub keeps the file of an addition that was uploaded outside of git."""
    mode = getattr(addition, _MODE)
    if mode not in ("lfs", "regular"):
        raise _unknown(f"{addition.path_in_repo} has the upload mode {mode!r}")
    return bool(mode == "lfs")


def is_ignored(addition: Any) -> bool:
    """Whether the repository's .gitignore leaves the file out."""
    return bool(getattr(addition, _IGNORED))


def mark_uploaded(addition: Any) -> None:
    """Note that the Hub has the content of a large file already, so that the client asks and sends nothing."""
    for name, value in ((_MODE, "lfs"), (_IGNORED, False), (_UPLOADED, True)):
        setattr(addition, name, value)


def forget_remote(addition: Any) -> None:
    """Forget that the branch held the same file when it was uploaded, for which the client would leave it out."""
    setattr(addition, _REMOTE, None)


def renew_xet_session() -> None:
    """Let the client begin anew with hf_xet, whose sessions before 1.8 repeat a failure instead of the request."""
    try:
        renew = import_module("huggingface_hub.utils._xet").abort_xet_session
    except (ImportError, AttributeError):  # then the next attempt is told the same, and the error as it is
        return
    renew()


def _unknown(what: str) -> HubError:
    return HubError(
        f"huggingface_hub {version('huggingface_hub')} is not known here ({what}); "
        f"install one that is tested: pip install '{SUPPORTED}'"
    )
