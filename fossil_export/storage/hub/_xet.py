"""hf_xet, with which the Hub's client moves large files: what it raises, and what it keeps on the disk.

Most of what it raises are Python's own exceptions, told apart by their text; the texts are those of xet-core
(xet_pkg/src/error.rs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec

_KINDS = (
    "Authentication error", "Configuration error", "Data integrity error", "I/O error", "Internal error",
    "Network error", "Not found", "Operation cancelled", "Previous task error", "Rate limited", "Server error",
    "Task error", "Timeout", "User cancelled",
)  # fmt: skip
_BEGINS = re.compile(f"(?:{'|'.join(_KINDS)}): ")
_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
_TOKEN = re.compile("/xet-(read|write)-token/")
_ERRNO = re.compile(r"\(os error (\d+)\)")
_UNREACHABLE = re.compile("error sending request|connection|timed out|^(Network error|Timeout): ", re.IGNORECASE)


def index_bytes(uploads: Iterable[int]) -> int:
    """The most that hf_xet keeps on the disk, under HF_XET_CACHE, of files of these sizes that were uploaded: a name
    for every chunk. Measured: 1 byte of 1000, and 3 kB for each file."""
    from huggingface_hub import constants

    used = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return sum(size // 500 + 4096 for size in uploads) if used else 0


def is_xet(problem: BaseException) -> bool:
    """Whether hf_xet raised it, after repeating what can be repeated for minutes by itself."""
    if type(problem).__module__ == "hf_xet":
        return True
    builtin = type(problem) in (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError)
    return builtin and _BEGINS.match(str(problem)) is not None


def status_of(problem: BaseException) -> int:
    """The status of an HTTP answer that it came from, 0 where there was none."""
    found = _STATUS.search(str(problem)) if is_xet(problem) else None
    return int(found[1]) if found else 0


def is_by_hub(problem: BaseException) -> bool:
    """Whether it was the Hub that hf_xet asked, for the way to its storage, and not the storage."""
    return is_xet(problem) and _TOKEN.search(str(problem)) is not None


def errno_of(problem: BaseException) -> int | None:
    """The system's number of an error with a file."""
    found = _ERRNO.search(str(problem)) if is_xet(problem) else None
    return int(found[1]) if found else None


def is_unreachable(problem: BaseException) -> bool:
    """Whether the storage service did not answer at all."""
    found = is_xet(problem) and not status_of(problem) and errno_of(problem) is None
    return found and _UNREACHABLE.search(str(problem)) is not None
