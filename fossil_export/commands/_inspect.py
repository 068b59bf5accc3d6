"""`fossil-export inspect`."""

from __future__ import annotations

import sys

import click

from fossil_export._console import print_json, print_warnings, progress
from fossil_export.commands._shared import BASE_HELP
from fossil_export.tables import print_inspection


@click.command()
@click.argument("adapter")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option("--all", "every", is_flag=True, help="A row for every module, not for every kind of module.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(adapter: str, base: str | None, every: bool, as_json: bool) -> None:
    """Show what ADAPTER holds, which base tensors it touches and what would stop a merge.

    ADAPTER is a path or an id on the Hub. Exits with 1 when something would.
    """
    from fossil_export._inspection import inspect as look

    found = look(adapter, base, progress=progress())
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found, every)
    print_warnings(found.warnings)
    if found.problems:
        sys.exit(1)
