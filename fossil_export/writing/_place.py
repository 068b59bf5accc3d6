"""Where a result is to be, and how it comes together there: file by file, by one process or many, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fossil_export.writing._sink import Sink


class Assembly(Sink, Protocol):
    """A result that comes together. What is noted of a finished file outlasts the process, so that an interrupted run
    goes on from there, and so that several processes can make a part each."""

    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted of each finished file, by its name; only of those that are still as they were then."""

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        """Say that the file `name` is finished, with what is to be known of it (JSON)."""

    def publish(self) -> None:
        """All is there: the result takes its place, and the notes go. Raises OutputError."""


class Place(Protocol):
    """A folder on this machine, or a place in an object store."""

    @property
    def name(self) -> str:
        """For messages and results."""

    def check(self, inputs: list[Path], overwrite: bool) -> None:
        """Raise OutputError unless a result may be made here without touching any of `inputs`."""

    def assemble(
        self, digest: str, about: Mapping[str, Any], needed: int, *, overwrite: bool = False, shared: bool = False
    ) -> AbstractContextManager[Assembly]:
        """Begin the result, or go on with what an earlier or another process has of it.

        `digest` stands for all that decides its bytes, and `about` for what that is, by name, to tell two apart
        (JSON). `needed` is its size in bytes. If it is `shared`, others make parts of it at the same time, and what is
        there of another digest is refused; else this process has it alone, and begins anew if the digest is another.
        Nobody sees the result before `publish`. Raises OutputError for want of room or permission.
        """
