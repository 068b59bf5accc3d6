"""The pages that are made out of the code name all of it, and are up to date."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from making import check, commands, reference

import fossil_export
from fossil_export import errors
from fossil_export.cli import main

PINNED = re.search(r"^click==(.+)$", (commands.ROOT / "constraints.txt").read_text(), re.MULTILINE)


def sections(page: Path) -> dict[str, str]:
    """The text below each "## " heading."""
    _, *parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_option_of_every_command_is_on_the_page() -> None:
    told = sections(commands.PAGE)
    missing = []
    for name, command in {"Before the command": main, **main.commands}.items():
        shown = told.get(name, "")
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                missing += [f"{name} {opt}" for opt in option.opts + option.secondary_opts if opt not in shown]
    assert missing == []


def test_every_command_on_the_page_is_there_and_has_its_options() -> None:
    told = sections(commands.PAGE)
    offered = {name: command for name, command in main.commands.items() if not command.hidden}
    assert set(told) == {"Before the command", *offered}
    for name, command in offered.items():
        known = {commands.anchor(name, opt) for option in command.params for opt in option.opts}
        assert set(re.findall(r'<a id="([a-z0-9-]+)">', told[name])) <= known


@pytest.mark.skipif(PINNED is None or version("click") != PINNED[1], reason="another click words its help otherwise")
def test_the_page_of_commands_is_up_to_date() -> None:
    made = commands.put(commands.PAGE, commands.reference(), "make docs-commands")
    assert commands.PAGE.read_text() == made, "run: make docs-commands"


def test_every_public_name_is_on_the_page_once() -> None:
    told = re.findall(r"^### (\w+)$", reference.PAGE.read_text(), re.MULTILINE)
    assert sorted([*told, *reference.OTHERS]) == sorted(fossil_export.__all__)  # type: ignore[attr-defined]
    for name in vars(errors):
        if isinstance(thing := getattr(errors, name), type) and issubclass(thing, errors.FossilExportError):
            assert f"| `{name}` |" in reference.PAGE.read_text()


def test_the_page_of_python_is_up_to_date() -> None:
    made = commands.put(reference.PAGE, reference.reference(), "make docs-python")
    assert reference.PAGE.read_text() == made, "run: make docs-python"


def test_a_page_without_its_comments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n")
    with pytest.raises(SystemExit, match=r"page.md: must have, once"):
        commands.put(tmp_path / "page.md", "made", "make it")


def test_help_becomes_markdown() -> None:
    text = "Takes --a-b, `--c` of <d>, 0<=x.\n\n\b\nkept\n  lines\n\nEnd with *.bin, a_b and well-known.\f\nhidden"
    assert list(commands._paragraphs(text)) == [
        "Takes `--a-b`, `--c` of \\<d>, 0<=x.",
        "```sh\nkept\n  lines\n```",
        "End with \\*.bin, a_b and well-known.",
    ]
    assert list(commands._paragraphs("\b\nExamples:\n  tool --a\n")) == ["Examples:", "```sh\ntool --a\n```"]


def test_docstrings_become_markdown() -> None:
    def thing(a: int, /, *more: str, b: str = "x", c: object = print) -> None:
        """First
        line.

        Raises:
            OSError: what
                it says.

        >>> thing(1)  # doctest: +SKIP

        Example:
            >>> thing(1)  # doctest: +SKIP
            2
        """

    assert reference.signature("thing", thing) == 'thing(a: int, *more: str, b: str = "x", c: object = ...) -> None'
    assert list(reference.docstring(thing)) == [
        "First line.",
        "**Raises:**",
        "- `OSError`: what it says.",
        "```pycon\n>>> thing(1)\n```",
        "**Example:**",
        "```pycon\n>>> thing(1)\n2\n```",
    ]


def site(folder: Path, **pages: str) -> list[str]:
    for name in ("genindex", "search"):
        (folder / f"{name}.html").write_text("")
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(body)
    return check.problems(folder)


def test_a_site_that_holds_together_passes(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("body { background: url('b.png') }")
    index = '<link rel=stylesheet href="a.css"><a href="two.html#x">2</a><a href="https://example.org/">out</a>'
    assert site(tmp_path, index=index, two='<p id="x"><a href="index.html">1</a><a href="#x">x</a>') == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('<a href="gone.html">a</a>', "index.html: gone.html: there is no such file"),
        ('<a href="#gone">a</a>', "there is no such anchor"),
        ('<img src="gone.png">', "there is no such file"),
        ('<script src="https://example.org/a.js"></script>', "is loaded from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "is loaded from elsewhere"),
        ('<a href="http://example.org/">a</a>', "use https"),
    ],
)
def test_each_fault_of_a_site_is_found(tmp_path: Path, body: str, says: str) -> None:
    assert len(found := site(tmp_path, index=body)) == 1 and says in found[0]


def test_orphans_foreign_fonts_and_an_empty_site_are_found(tmp_path: Path) -> None:
    assert "no pages are there" in check.problems(tmp_path)[0]
    (tmp_path / "a.css").write_text("@import 'https://example.org/b.css'; a { src: url(//example.org/f.woff) }")
    found = site(tmp_path, index="", alone="")
    assert [line.partition(": ")[0] for line in found] == ["a.css", "a.css", "alone.html"]
