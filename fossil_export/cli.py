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
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from fossil_export import _terminal
from fossil_export._console import any_encoding, echo, log_to_stderr, printable, quiet_hub
from fossil_export.commands._command import DEBUG, EXIT_CODES, messages, write_epilog
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
        _terminal.quiet = _terminal.verbose = False  # of an earlier command in this process
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
        finally:
            log_to_stderr(False)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_epilog(self.epilog, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            ctx.fail(self.unknown(name))
        return super().resolve_command(ctx, args)

    def unknown(self, name: str | None) -> str:
        """The line for a command that is none, with the one that may have been meant."""
        from difflib import get_close_matches  # commands must start fast

        near = get_close_matches(str(name), [one for one in self.commands if one != "help"], 1)
        return f"No such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")

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
            if ctx.meta.get(DEBUG):
                _show(problem)
            _fail(ctx, str(problem))
        except BrokenPipeError:  # whoever read our output has gone; click ends quietly
            raise
        except OSError as problem:  # what no part of the package expected of a file
            if _is_of_printing(problem):
                raise
            if ctx.meta.get(DEBUG):
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
    """What click says of an option quotes what was typed. Without a command it is the whole help."""
    if type(problem).__name__ == "NoArgsIsHelpError":  # from click 8.2 on
        return problem
    vars(problem)["message"] = printable(problem.message)
    if isinstance(problem, click.UsageError):
        vars(problem)["show"] = partial(_show_usage, problem)
    return problem


def _show_usage(problem: click.UsageError, file: object = None) -> None:
    """What click prints of a wrong command line, in one line (choices have a line each), labelled as all errors are."""
    message = " ".join(line.strip() for line in problem.format_message().splitlines())
    echo(message, label="error: ", fg="red", err=True)
    if problem.ctx is not None:
        echo(f"Try '{problem.ctx.command_path} {problem.ctx.help_option_names[-1]}' for help.", err=True)


def _show(problem: BaseException) -> None:
    """The traceback, without what nobody else may see."""
    for line in redacted("".join(traceback.format_exception(problem))).splitlines():
        echo(line, err=True)


def _fail(ctx: click.Context, message: str) -> None:
    echo(message.replace("\n", " "), label="error: ", fg="red", err=True)
    ctx.exit(1)


_CODES = "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES)
_EPILOG = f"""\b
Exit codes:
{_CODES}

\b
Examples:
  fossil-export inspect my-adapter
  fossil-export merge my-adapter --output my-model
  fossil-export verify my-model
  fossil-export COMMAND --help
"""


@click.group(
    cls=_Group,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fossil-export")
def main() -> None:
    """Merge, export and publish adapters trained with PEFT: MiSS (FOSSIL, Bone), LoRA, DoRA and their family."""
    quiet_hub()


main.params += messages()
for command in (inspect, merge, verify, onnx, convert, push):
    main.add_command(command)


@main.command(name="help", hidden=True)
@click.argument("name", metavar="[COMMAND]", required=False)
@click.pass_context
def help_(ctx: click.Context, name: str | None) -> None:
    """Show the help of COMMAND, as `fossil-export COMMAND --help` does."""
    assert ctx.parent is not None
    found = main if name is None else main.get_command(ctx, name)
    if found is None:
        raise click.UsageError(main.unknown(name), ctx.parent)
    its = ctx.parent if found is main else found.context_class(found, ctx.parent, name)
    for line in found.get_help(its).splitlines():
        echo(line)
