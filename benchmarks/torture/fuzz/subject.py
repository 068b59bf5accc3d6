"""What is damaged."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Protocol


class Unjudged(Exception):
    """The judge cannot say: its own library does not read these inputs. With the reason."""


class Subject(Protocol):
    @property
    def name(self) -> str:
        """Of the case, as tables show it."""

    def make(self, folder: Path) -> None:
        """Write sound inputs into an empty folder, once for all attempts."""

    def mutate(self, folder: Path, random: Random) -> str:
        """Damage a copy of them where it lies, as one who knows the format, and say how."""

    def command(self, folder: Path, random: Random) -> list[str]:
        """What follows `fossil-export`; an output is to be `folder / "out"`."""

    def judge(self, folder: Path) -> str | None:
        """What is wrong with the result of a command that ended well, told by other code than ours (PEFT's forward
        pass, a format's own library); None if it is right. Raises Unjudged."""
