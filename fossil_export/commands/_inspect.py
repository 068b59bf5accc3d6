"""`fossil-export inspect`."""

from __future__ import annotations

import sys
from functools import partial

import click

from fossil_export import _terminal
from fossil_export._console import echo, print_warnings, progress
from fossil_export._extras import of_base, of_names
from fossil_export.commands._command import Command, option
from fossil_export.commands._shared import adapter_argument, base_option, expect, json_option, show
from fossil_export.tables import print_inspection

EXAMPLES = (
    "fossil-export inspect my-adapter",
    "fossil-export inspect user/my-adapter --base my-base --all",
)


@click.command(cls=Command, short_help="Show what an adapter is, and what would stop a merge.", examples=EXAMPLES)
@adapter_argument
@base_option()
@option("--all", "every", is_flag=True, help="A row for every module, not for every kind of module.")
@json_option
def inspect(adapter: str, base: str | None, every: bool, as_json: bool) -> None:
    """Show what ADAPTER is, which tensors of its base it changes, and what would stop a merge.

    ADAPTER is a folder, an id on the Hub or an address. Exits with 1 if a merge would be refused.
    """
    from fossil_export._inspection import inspect as look

    expect(*of_names(adapter), *of_base(base))
    found = look(adapter, base, progress=progress())
    show(found.to_dict() if as_json else None, partial(print_inspection, every=every), found)
    print_warnings(found.warnings)
    if found.problems:
        if _terminal.quiet:  # the table has it otherwise
            echo(found.problems[0], label="error: ", fg="red", err=True)
        sys.exit(1)
