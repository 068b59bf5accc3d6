"""The `fossil-export` command: its commands are in `commands/`, its errors end here."""
# ruff: noqa: E402

from __future__ import annotations

from fossil_export._isolation import forget_current_folder

forget_current_folder()  # before anything that is installed is imported, and could come from there

import io
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from fossil_export._console import any_encoding, echo, printable, progress, quiet_hub
from fossil_export._progress import showing
from fossil_export.commands._convert import convert
from fossil_export.commands._inspect import inspect
from fossil_export.commands._merge import merge
from fossil_export.commands._onnx import onnx
from fossil_export.commands._push import push
from fossil_export.commands._verify import verify
from fossil_export.errors import FossilExportError, reason, remedy
from fossil_export.storage.hub._background import is_anything_left
from fossil_export.storage.hub._errors import redacted
from fossil_export.version import __version__


class _Group(click.Group):
    """Turns the package's errors into one line on stderr and exit code 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        _buffer_output()
        any_encoding()
        try:
            return super().main(*arguments, **options)
        except OSError as problem:  # of printing; a broken pipe ends in click
            _fail_to_print(problem)
        except SystemExit as end:
            if is_anything_left():  # Python would wait for it
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            raise

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except click.ClickException as problem:
            raise _shown(problem) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as problem:
            raise _shown(problem) from None
        except FossilExportError as problem:
            if ctx.params.get("debug"):
                _show(problem)
            _fail(ctx, str(problem))
        except BrokenPipeError:  # whoever read our output has gone; click ends quietly
            raise
        except OSError as problem:  # what no part of the package expected of a file
            if _is_of_printing(problem):
                raise
            if ctx.params.get("debug"):
                _show(problem)
            if problem.filename is None and not _is_anywhere():
                _fail(ctx, "the current folder is gone; change to one that is there (cd)")
            name = f"{problem.filename}: " if problem.filename else ""
            _fail(ctx, f"{name}{reason(problem)}; {remedy(problem)}")


def _buffer_output() -> None:
    """Let no half of a text get lost: Python does not go on with what the system took a part of, where nothing is
    buffered (PYTHONUNBUFFERED)."""
    if isinstance(raw := getattr(sys.stdout, "buffer", None), io.RawIOBase):
        buffer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, sys.stdout.errors, write_through=True)


def _is_anywhere() -> bool:
    try:
        return Path.cwd().is_dir()
    except OSError:
        return False


def _is_of_printing(problem: OSError) -> bool:
    frame = problem.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") == click.utils.__name__


def _fail_to_print(problem: OSError) -> NoReturn:
    with suppress(OSError, ValueError):  # what is left in the buffer would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(OSError):
        message = f"standard output: {reason(problem)}; send it elsewhere (the files that were written are whole)"
        echo(message, label="error: ", fg="red", err=True)
    sys.exit(1)


def _shown(problem: click.ClickException) -> click.ClickException:
    """What click says of an option quotes what was typed."""
    vars(problem)["message"] = printable(problem.message)
    return problem


def _show(problem: BaseException) -> None:
    """The traceback, without what nobody else may see."""
    for line in redacted("".join(traceback.format_exception(problem))).splitlines():
        echo(line, err=True)


def _fail(ctx: click.Context, message: str) -> None:
    echo(message.replace("\n", " "), label="error: ", fg="red", err=True)
    ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fossil-export")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Take a model fine-tuned with FOSSIL (Bone, DiSHA, MiSS), LoRA or its family to where it is used."""
    quiet_hub()
    click.get_current_context().with_resource(showing(progress()))  # the commands' steps have bars of their own


for command in (merge, inspect, verify, onnx, convert, push):
    main.add_command(command)
