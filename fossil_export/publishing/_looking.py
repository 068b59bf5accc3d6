"""What a repository on the Hub is before anything is done to it: asked, and nothing made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fossil_export.checkpoints._companions import CARD
from fossil_export.errors import HubError
from fossil_export.publishing._target import Target


@dataclass(frozen=True)
class Looked:
    """`exists` is None if that is not known. `files` are those that a commit would be on top of, by name with their
    hash, and `card` is the README.md among them. `unchecked` says what could not be asked, and why."""

    exists: bool | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    card: str | None = None
    unchecked: tuple[str, ...] = ()


def look(target: Target, private: bool = False) -> Looked:
    """Ask for all that may be known without writing. A renamed repository, or one named without its owner, has its
    whole name in `target` afterwards. Raises no HubError: what the Hub does not tell is `unchecked`."""
    exists: bool | None = None
    files: dict[str, str] = {}
    card = None
    unchecked: list[str] = []
    try:
        exists = target.find(private)
        if exists:
            head = target.head_below()
            files = target.files(head)
            card = target.read(CARD, head) if CARD in files else None
    except HubError as problem:
        unchecked.append(f"what the repository holds was not checked: {problem}")
    if exists is not None:
        try:
            target.check_writing(exists)
        except HubError as problem:
            unchecked.append(f"whether you may write there was not checked: {problem}")
    return Looked(exists, files, card, tuple(unchecked))
