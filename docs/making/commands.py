"""The reference of commands and options in docs/commands.md, made from the commands themselves.

`python -m making.commands` writes the made part of the page anew; with --check it says whether that part is up to date.
What stands outside the two comments is written by hand.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from making.links import ROOT

PAGE = ROOT / "docs" / "commands.md"
PROGRAM = "fossil-export"


def reference() -> str:
    """Every command with its help, and a table of its options."""
    from fossil_export.cli import main

    root = click.Context(main, info_name=PROGRAM, **main.context_settings)
    parts = [f"## Before the command\n\n{_tables(main, root)}"]
    for name in main.list_commands(root):
        command = main.get_command(root, name)
        if command is None or command.hidden:
            continue
        parts.append(_command(command, click.Context(command, info_name=name, parent=root)))
    return "\n\n".join(parts)


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {command.name}", f"```\n{usage}\n```", *_paragraphs(command.help or "")]
    return "\n\n".join([*parts, _tables(command, context), *_paragraphs(command.epilog or "")])


def _paragraphs(text: str) -> Iterator[str]:
    """Click's help as Markdown: "\b" is what must keep its lines, a title and what can be typed."""
    for paragraph in re.split(r"\n\s*\n", re.sub(r"\f.*", "", text, flags=re.DOTALL).strip(" \n")):
        if not paragraph.lstrip().startswith("\b"):
            yield from [prose(" ".join(paragraph.split()))] if paragraph.strip() else []
            continue
        title, _, rest = paragraph.lstrip()[1:].strip("\n").partition("\n")
        if title.endswith(":") and rest:
            yield title
        else:
            rest = f"{title}\n{rest}"
        yield f"```sh\n{textwrap.dedent(rest).strip()}\n```"


class _Sections(click.HelpFormatter):
    """What a command's help says of its options: (heading, rows) of each group."""

    def __init__(self) -> None:
        super().__init__(width=10_000)
        self.found: list[tuple[str, list[tuple[str, str]]]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.found.append((name, []))
        yield

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 0, col_spacing: int = 0) -> None:
        self.found[-1][1].extend((names.strip(), said) for names, said in rows)


def _tables(command: click.Command, context: click.Context) -> str:
    """The options as the help has them, with their defaults; --help is told once, above."""
    sections = _Sections()
    command.format_options(context, sections)
    tables = []
    for heading, rows in sections.found:
        told = [row for row in rows if "--" in row[0] and (context.parent is None or "--help" not in row[0])]
        if told:
            name = str(command.name)
            lines = [
                f"| {_named(names, name)} | {prose(' '.join(said.split()), is_cell=True)} |" for names, said in told
            ]
            tables.append("\n".join([f"| {heading} | |", "|---|---|", *lines]))
    return "\n\n".join(tables)


def anchor(command: str, option: str) -> str:
    """The place of an option on the page: merge-output, fossil-export-debug."""
    return f"{PROGRAM if command == 'main' else command}-{option.lstrip('-')}"


def _named(names: str, command: str) -> str:
    """The option in code, with a place that can be linked to."""
    long = next(iter(re.findall(r"--[a-z0-9][a-z0-9-]*", names)), names)
    names = re.sub(r"(?<=\S)\|(?=\S)", " | ", names)  # so that a long list of choices can be broken
    return f'<a id="{anchor(command, long)}"></a>`{_cell(names)}`'


def prose(text: str, is_cell: bool = False) -> str:
    """`text` with its option names and file patterns in code, and nothing that Markdown would take for its own."""
    parts = re.split(r"(`[^`]+`)", text)
    for at, part in enumerate(parts):
        if at % 2 == 0:
            part = re.sub(r"(?<![\w-])(--?[a-z][a-z0-9-]*)(?![\w])", r"`\1`", part)
            inner = re.split(r"(`[^`]+`)", part)
            parts[at] = "".join(
                re.sub(r"(\*|<(?=[a-zA-Z/!?])|(?<!\w)_|_(?!\w))", r"\\\1", piece) if i % 2 == 0 else piece
                for i, piece in enumerate(inner)
            )
    done = "".join(parts)
    return _cell(done) if is_cell else done


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def put(page: Path, made: str, by: str) -> str:
    """The text of `page` with `made` between the two comments that say what it was made by. Raises SystemExit if they
    are not there."""
    begin, end = f"<!-- made by `{by}`: change the code, not this -->", "<!-- end of what is made -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page}: must have, once and in this order, the lines {begin} and {end}")
    return f"{text[: text.index(begin)]}{begin}\n\n{made}\n\n{text[text.index(end) :]}"


def write(page: Path, made: str, by: str, check: bool) -> int:
    """Write `page` anew, or with `check` only say whether it would change; the exit code."""
    text = put(page, made, by)
    if text == page.read_text():
        return 0
    if check:
        print(f"{page.relative_to(ROOT)}: is not up to date; run {by}", file=sys.stderr)
        return 1
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(write(PAGE, reference(), "make docs-commands", "--check" in sys.argv[1:]))
