"""What the commands print: short tables on a terminal, one JSON object for programs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from fossil_export._log import log
from fossil_export._progress import Bar, Progress, Shown
from fossil_export._shown import printable as printable
from fossil_export._shown import readable_bytes as readable_bytes
from fossil_export._terminal import colours, erasing, live, padded, watched, width
from fossil_export.storage.hub._client import LOGGERS


def echo(text: str = "", *, label: str = "", err: bool = False, **style: Any) -> None:
    """The one place where a line is printed: nothing in it is obeyed by a terminal, whatever names it holds.

    `style` is of the label, or of the whole line if there is none.
    """
    text = printable(text)
    shown = click.style(label, **style) + text if label else click.style(text, **style) if style else text
    click.echo(shown, err=err, color=colours())


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
    columns = max(width(name) for name, _ in pairs)
    for name, value in pairs:
        echo(f"{padded(name, columns)}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; those that hold only numbers go to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(width, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:]) for column in columns]
    for index, row in enumerate([header, *rows]):
        cells = (padded(cell, wide, side) for cell, wide, side in zip(row, widths, right, strict=True))
        style: dict[str, Any] = {"bold": True} if index == 0 else {}
        echo("  ".join(cells).rstrip(), **style)


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        echo(warning, label="warning: ", fg="yellow", err=True)


def progress() -> Shown:
    """How a command shows how far it is: bars on stderr that go when they are done, only notes on a terminal that
    cannot erase, nothing if that is none."""
    return Bar(leave=False) if live() else _say_note if watched() else False


def _say_note(state: Progress) -> None:
    if state.note:
        echo(state.note, err=True)


def quiet_hub() -> None:
    """Keep the Hub's client from writing bars and retries into pipes, and from logging signed addresses."""
    if not live():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_without_queries)


class _ToStderr(logging.Handler):
    """Lines of --verbose, with the seconds since the start. One that cannot be written stops no work."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            if live():
                sys.stderr.write(erasing())  # in place of a bar or a status line
            echo(record.getMessage(), label=f"[{time.perf_counter() - _BEGAN:7.2f} s] ", dim=True, err=True)


_BEGAN = time.perf_counter()


def log_to_stderr(wanted: bool = True) -> None:
    """Have what the package logs shown on stderr, or no longer."""
    for handler in [one for one in log.handlers if isinstance(one, _ToStderr)]:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    if wanted:
        log.addHandler(_ToStderr())
        log.setLevel(logging.INFO)
        log.disabled = False  # libraries that configure logging turn off all loggers that are there


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return True
