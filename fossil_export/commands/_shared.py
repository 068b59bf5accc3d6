"""What the commands have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fossil_export import _terminal
from fossil_export._console import print_json
from fossil_export._extras import Need, needing
from fossil_export.commands._command import GENERAL, option
from fossil_export.commands._types import FILE

adapter_argument = click.argument("adapter", type=FILE)

trust_option = option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that came with the base, if its config names some (auto_map). Read that code first.",
)

json_option = option("--json", "as_json", group=GENERAL, is_flag=True, help="Print one JSON object on stdout.")


def base_option(group: str = "Options", of: str = "the adapter names") -> Callable[[Any], Any]:
    """--base, under a heading."""
    said = f"A folder, a weights file, an id on the Hub or an address.  [default: the one that {of}]"
    return option("--base", group=group, metavar="BASE", type=FILE, help=said)


def expect(*needs: Need) -> None:
    """Until the command ends, a package that is missing is named together with those of `needs` that are missing."""
    click.get_current_context().with_resource(needing(*needs))


def weighted(given: str) -> str | tuple[str, float]:
    """An adapter as it is typed: a path, an id, or either with "=" and a weight. A path that is there and has a "=" in
    its name is a path."""
    name, sign, number = given.rpartition("=")
    if not sign or _is_there(given):
        return given
    try:
        weight = float(number)
    except ValueError:
        if "://" in given:  # an address, which may have a "=" in it
            return given
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise click.UsageError(
            f"{given!r} is neither a path that is there nor ADAPTER=WEIGHT with a number for the weight, as in "
            f"{name or 'my-adapter'}=0.5."
        )
    return name, weight


def numbered(given: str) -> tuple[int, int]:
    """A part as it is typed, "3/16"."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", given)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.UsageError(f"--part is {given!r}, expected one of how many, from 1/16 to 16/16.")
    return int(match[1]), int(match[2])


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def publishing(group: str = "Options") -> Callable[[Any], Any]:
    """The options of commands that write to the Hub, named as `hf upload` names them."""
    options = (
        option("--commit-message", group=group, metavar="TEXT", help="Title of the commit."),
        option("--create-pr", group=group, is_flag=True, help="Open a pull request instead of committing."),
        option("--revision", group=group, metavar="BRANCH", help="Branch to commit to; made if it is not there."),
        option("--private", group=group, is_flag=True, help="Make a new repository private."),
    )

    def decorated(command: Any) -> Any:
        for one in options:
            command = one(command)
        return command

    return decorated


def show(as_json: dict[str, Any] | None, table: Any, result: Any) -> None:
    """One JSON object if it was asked for, else the table, unless all is to be quiet."""
    if as_json is not None:
        print_json(as_json)
    elif not _terminal.quiet:
        table(result)
