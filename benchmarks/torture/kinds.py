"""The kinds of torture. A new one is a module with these four names and a line in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torture.rows import Row


@dataclass(frozen=True)
class Options:
    """`count` attempts in all, from `seed` on, of the cases whose names match `only`, in at most `seconds`; `done` are
    the (case, place, seed) that the journal has."""

    count: int
    seed: int
    seconds: float
    only: str
    jobs: int
    done: frozenset[tuple[str, str, int]]


class Kind(Protocol):
    COUNT: int
    """Attempts of `make torture`."""

    OUTCOMES: Mapping[str, bool]
    """Every word an attempt can end with, and whether that is as promised."""

    @staticmethod
    def run(options: Options, report: Callable[[Row], None]) -> None:
        """Make the attempts that are not `done`, and report each."""

    @staticmethod
    def table(rows: list[Row]) -> str:
        """What docs/reliability.md says of them: a table in Markdown."""


KINDS = ("kills", "faults", "fuzz")
"""Modules of this package."""
