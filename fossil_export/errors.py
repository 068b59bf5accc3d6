"""The errors a user can meet.

Every message is one line that names the file, the tensor where there is one, and the remedy. The command
line prints it and exits with 1; the API raises it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar


class FossilExportError(Exception):
    """Base of everything this package raises on purpose."""


class AdapterError(FossilExportError):
    """The adapter cannot be read, or its tensors and its config disagree."""


class CheckpointError(FossilExportError):
    """The base model's files are missing, damaged or in a form that cannot be merged into."""


class MergeError(FossilExportError):
    """Adapter and base are each sound, but do not go together, or the result would not be finite."""


class OnnxError(FossilExportError):
    """A graph cannot be read, is not the base model's, or cannot take the adapter in the mode asked for."""


class HubError(FossilExportError):
    """The Hub refuses, cannot be reached, or has something else than was asked for."""


class StorageError(FossilExportError):
    """An object store, or another place with a URL, refuses, cannot be reached, or changed while it was read."""


class OutputError(FossilExportError):
    """The output cannot be written where it was asked for."""


class ClusterError(FossilExportError):
    """A cluster cannot be reached, or a worker of it cannot do its part."""


class MissingExtraError(FossilExportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str, install: str | None = None) -> None:
        install = install or f"pip install 'fossil-export[{extra}]'"
        super().__init__(f"{purpose} needs {package}: {install}")


_REMEDIES = {
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: "fetch it again",
    errno.EIO: "check its disk, or fetch it again",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ESTALE: "run the command again",
    errno.EINTR: "run the command again",
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "choose a place that may be written to",
}


def remedy(problem: OSError) -> str:
    """What the user can do about what the system said."""
    return _REMEDIES.get(problem.errno or 0, "check that path and its permissions")


def reason(problem: OSError) -> str:
    """What the system said, without the name of the file."""
    return problem.strerror or str(problem) or type(problem).__name__


def unreadable(path: str | Path, problem: OSError) -> str:
    """The line for a file or folder that the system does not let us read."""
    return f"{path}: cannot be read: {reason(problem)}; {remedy(problem)}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into an OSError of the block that names none, as those of reading do."""
    try:
        yield
    except OSError as problem:
        if problem.filename is None:
            problem.filename = str(path)
        raise


def failed(
    output: str | Path, problem: OSError, folder: Path, hint: str = "make room or choose another --output"
) -> str:
    """The line for what the system refused while `output` was made in `folder`: it may have been another file."""
    name = None if problem.filename is None else Path(os.fsdecode(problem.filename))
    if name is None or not name.is_absolute() or name.is_relative_to(folder) or problem.filename2 is not None:
        of = f" ({name})" if name is not None and name.is_absolute() and name != folder else ""
        return f"{output}: writing failed: {reason(problem)}{of}; {hint}"
    return f"{name}: cannot be used: {reason(problem)}; {remedy(problem)}"


Problem = TypeVar("Problem", bound=FossilExportError)


def longer(problem: Problem, more: str) -> Problem:
    """An error of the same class with more to say; to be raised from `problem`, which stays as it is."""
    kind = type(problem)
    return kind.__new__(kind, f"{problem}{more}")  # some classes make their text themselves


def listed(names: list[str], limit: int = 5) -> str:
    """Join `names` for one line of text, cut after `limit` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
