"""What every command has: options in groups, examples as they are typed, --quiet, --verbose, --debug."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from fossil_export import _terminal
from fossil_export._console import progress
from fossil_export._progress import showing

GENERAL = "Messages"
"""The last group of every command's options."""

WIDEST = 26
"""Of the names of an option that have their text beside them, and not below."""

EXIT_CODES = (
    ("0", "done; verify: parity"),
    ("1", "refused or failed; verify: no parity; inspect: a merge would fail"),
    ("2", "the command line is wrong"),
    ("130", "ended by Ctrl-C (129: its terminal closed, 143: kill)"),
)
"""What a process of this command ends with. Signals are in `_signals`, the rest in `cli`."""


class Option(click.Option):
    """An option that belongs to a `group`, a heading in the command's help."""

    def __init__(self, *arguments: Any, group: str = "Options", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


def option(*names: str, group: str = "Options", **settings: Any) -> Callable[[Any], Any]:
    """click's decorator, with the heading that the option stands under."""
    return click.option(*names, cls=Option, group=group, **settings)


class Command(click.Command):
    """`examples` are lines that can be typed; they end the help, and are its `epilog` for whoever reads the tree."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = tuple(examples)
        self.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None
        self.params += messages()

    def invoke(self, ctx: click.Context) -> Any:
        """What has no `progress=` is shown, too, now that the options have said whether anything is."""
        with showing(progress()):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                group = parameter.group if isinstance(parameter, Option) else GENERAL
                groups.setdefault(group, []).append(record)
        groups[GENERAL] = groups.pop(GENERAL)  # is last
        lengths = [len(names) for records in groups.values() for names, _ in records]
        column = max(length for length in lengths if length <= WIDEST)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl([(f"{names:<{column}}", text) for names, text in records], col_max=column)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_epilog(self.epilog, formatter)


def write_epilog(text: str | None, formatter: click.HelpFormatter) -> None:
    """Below the options, under headings of its own."""
    if text:
        formatter.write("\n" + text.replace("\b\n", "").rstrip() + "\n")  # click's mark of lines that are not wrapped


def messages() -> list[click.Option]:
    """The options that every command takes, and `fossil-export` itself before the command's name."""
    return [
        Option(
            ["-q", "--quiet"],
            group=GENERAL,
            is_flag=True,
            expose_value=False,
            callback=_quiet,
            help="Print only warnings, errors and the object of --json.",
        ),
        Option(
            ["-v", "--verbose"],
            group=GENERAL,
            is_flag=True,
            expose_value=False,
            callback=_verbose,
            help="Say on stderr what is done: files, commits, versions, seconds.",
        ),
        Option(
            ["--debug"],
            group=GENERAL,
            is_flag=True,
            expose_value=False,
            callback=_debug,
            help="Show the traceback of an error.",
        ),
    ]


def _quiet(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        if _terminal.verbose:
            raise click.UsageError("--quiet and --verbose exclude each other; leave one out.")
        _terminal.quiet = True
        from fossil_export._console import quiet_hub

        quiet_hub()  # again: bars of the Hub's client, too


def _verbose(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        if _terminal.quiet:
            raise click.UsageError("--quiet and --verbose exclude each other; leave one out.")
        _terminal.verbose = True
        from fossil_export._console import log_to_stderr
        from fossil_export._log import log_surroundings

        log_to_stderr()
        log_surroundings()


def _debug(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta[DEBUG] = True


DEBUG = "fossil_export.debug"
