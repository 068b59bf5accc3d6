"""Rows of a kind as one, names with their revision, and adapters in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fossil_export._console import echo
from fossil_export._grouping import grouped
from fossil_export.tables._fitting import print_table

if TYPE_CHECKING:
    from fossil_export.adapters import Adapter

GROUPS = 60
"""Kinds of rows that a table shows; more are told by their number."""


def print_grouped(header: Sequence[str], rows: Sequence[Sequence[str]], every: bool) -> None:
    """Rows of one kind as one with their number, unless `every` row is asked for."""
    if every:
        print_table(header, rows)
        return
    groups = grouped(rows)
    shown = [(*group.cells, str(len(group))) for group in groups[:GROUPS]]
    print_table((*header, "×"), shown)
    if len(groups) > GROUPS:
        echo(f"and {len(groups) - GROUPS} more kinds; --all shows every row")


def named_at(name: str, revision: str | None) -> str:
    return name + (f" at {revision}" if revision else "")


def described(adapter: Adapter) -> str:
    """Its method, and its rank if it has one."""
    return adapter.variant + (f", r={adapter.rank}" if adapter.rank else "")
