"""What the commands print: short tables on a terminal, one JSON object for programs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

from fossil_export._progress import Bar, Shown
from fossil_export._shown import printable as printable
from fossil_export._shown import readable_bytes as readable_bytes
from fossil_export.storage.hub._client import LOGGERS


def echo(text: str = "", *, label: str = "", err: bool = False, **style: Any) -> None:
    """The one place where a line is printed: nothing in it is obeyed by a terminal, whatever names it holds.

    `style` is of the label, or of the whole line if there is none.
    """
    text = printable(text)
    shown = click.style(label, **style) + text if label else click.style(text, **style) if style else text
    click.echo(shown, err=err)


def print_json(value: dict[str, Any]) -> None:
    """One line; what could not be printed, or would be obeyed, is escaped as JSON has it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, allow_nan=False)
    if not text.isprintable():
        text = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
    click.echo(text)


def any_encoding() -> None:
    """Let the streams escape what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Lines of name and value, aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        echo(f"{name:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; those that hold only numbers go to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:]) for column in columns]
    for index, row in enumerate([header, *rows]):
        cells = (
            f"{cell:>{width}}" if side else f"{cell:<{width}}"
            for cell, width, side in zip(row, widths, right, strict=True)
        )
        echo("  ".join(cells).rstrip(), bold=index == 0)


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        echo(warning, label="warning: ", fg="yellow", err=True)


def progress() -> Shown:
    """How a command shows how far it is: bars on stderr that go when they are done, nothing if that is no terminal."""
    return Bar(leave=False) if sys.stderr.isatty() else False


def quiet_hub() -> None:
    """Keep the Hub's client from writing bars and retries into pipes, and from logging signed addresses."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_without_queries)


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return True
