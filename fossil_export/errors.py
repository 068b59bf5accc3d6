"""The errors a user can meet.

Every message is one line that names the file, the tensor where there is one, and the remedy. The command
line prints it and exits with 1; the API raises it.
"""

from __future__ import annotations

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


class OutputError(FossilExportError):
    """The output cannot be written where it was asked for."""


class MissingExtraError(FossilExportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'fossil-export[{extra}]'")


Problem = TypeVar("Problem", bound=FossilExportError)


def longer(problem: Problem, more: str) -> Problem:
    """An error of the same class with more to say; to be raised from `problem`, which stays as it is."""
    kind = type(problem)
    return kind.__new__(kind, f"{problem}{more}")  # some classes make their text themselves


def listed(names: list[str], limit: int = 5) -> str:
    """Join `names` for one line of text, cut after `limit` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
