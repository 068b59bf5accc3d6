"""Every link in the Markdown files leads somewhere, as GitHub shows them; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from making.links import ROOT, anchors, inside, links, outside, problems, slug, source
from making.pages import ELSEWHERE, HOME, NAV, lay_out, on_site, page_files, place

ADDRESS = "https://example.org/them/tool"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of two pages, a picture and a program."""
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nSource = "{ADDRESS}"\n')
    (tmp_path / "README.md").write_text("# Tool\n\n## How it's done\n\nWords.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "Über.md").write_text("# Über `uns` (and *others*)\n\n## Twice\n\n## Twice\n")
    (tmp_path / "docs" / "plot.png").write_bytes(b"")
    (tmp_path / "run.py").write_text("")
    return tmp_path


def wrong(tree: Path, line: str) -> list[str]:
    (tree / "docs" / "page.md").write_text(f"# Page\n\n{line}\n")
    return problems(tree, ["docs/page.md"])


def test_every_link_of_the_repository_leads_somewhere() -> None:
    others = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(".github/**/*.md"))]
    assert problems(ROOT, page_files() + others) == []


def test_every_page_is_in_the_side_bar() -> None:
    named = {HOME, *(file for group in NAV.values() for file in group)}
    assert [file for file in page_files() if file not in named] == []
    assert set(ELSEWHERE) <= set(page_files()) & named


@pytest.mark.parametrize(
    "line",
    [
        "[a](../README.md#how-its-done) ![p](plot.png 'A plot') [u](Über.md#über-uns-and-others)",
        "[a](Über.md#twice-1) <a href='../run.py'>it</a> [here](#page)",
        f"[a]({ADDRESS}/blob/main/README.md#tool) ![p]({ADDRESS}/raw/main/docs/plot.png)",
        "`[no](link.md)` and ``[no](`link.md)``\n\n```\n[no](link.md)\n```\n\n<!-- [no](link.md) -->",
        "> ~~~\n> [no](link.md)\n> ~~~",
        "[a](https://example.org/a_(b)?c=d#e) https://example.org/f. <https://example.org> [m](mailto:me@example.org)",
        "[a]: ../run.py\n[![p](plot.png)](../run.py)",
    ],
)
def test_good_links_are_good(tree: Path, line: str) -> None:
    assert wrong(tree, line) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[a](gone.md)", "docs/page.md:3: gone.md: there is no such file"),
        ("[a](../readme.md)", "there is no such file"),
        ("[a](../README.md#how-it's-done)", "README.md has no such heading; near: how-its-done"),
        ("[a](Über.md#twice-2)", "no such heading"),
        ("[a](#pages)", "no such heading"),
        ("![a](gone.png)", "there is no such file"),
        ("[![p](gone.png)](../run.py)", "there is no such file"),
        ("<img src='gone.png'>", "there is no such file"),
        ("[a]: gone.md", "there is no such file"),
        (f"[a]({ADDRESS}/blob/main/gone.md)", "there is no such file"),
        (f"[a]({ADDRESS}/blob/main/README.md#gone)", "no such heading"),
        ("[a](../../other.md)", "leads out of the repository"),
        ("[a](/README.md)", "begins with a slash"),
        ("[a]()", "leads nowhere"),
        ("[a](http://example.org)", "use https"),
        ("[a](https://example)", "is no https address"),
        ("[a](https:/example.org)", "is no https address"),
        ("[a](https://example.org//b)", "has two slashes"),
        ("see https://exa_mple.org/", "is no https address"),
        ("[a](mailto:me)", "is no address of mail"),
    ],
)
def test_each_way_to_break_a_link_is_found(tree: Path, line: str, says: str) -> None:
    assert len(found := wrong(tree, line)) == 1 and says in found[0]


def test_headings_have_the_anchors_of_github() -> None:
    assert slug("Where `PEFT`'s merge is *another* one: 2.0_x") == "where-pefts-merge-is-another-one-20_x"
    assert slug("‖ΔW‖ & [a link](b.md) – or snake_case") == "δw--a-link--or-snake_case"
    assert anchors('# A\n\n## A\n\n```\n# no\n```\n<a id="b--c"></a>\n') == {"a", "a-1", "b--c"}


def test_a_link_is_found_with_its_place() -> None:
    text = 'one\n[a `code` b](x.md#y "title") and <img alt="" src="z.png">\n'
    assert [(link.target, link.line, text[link.start : link.end]) for link in links(text)] == [
        ("x.md#y", 2, "x.md#y"),
        ("z.png", 2, "z.png"),
    ]


def test_the_site_has_links_to_pages_and_to_the_source(tree: Path) -> None:
    text = (
        f"[a](docs/Über.md#twice) [b](run.py) [c](docs) ![d](docs/plot.png) <img src='docs/plot.png'> [e](#tool) "
        f"[f]({ADDRESS}/blob/main/docs/Über.md) <a href='docs/Über.md#twice'>g</a> `[h](run.py)` "
        '<a id="a-b"></a> `<a id="c"></a>`'
    )
    files = {"README.md", "docs/Über.md"}
    made, images, unknown = on_site("README.md", text, files, tree)
    assert made == (
        f"[a](über.md#twice) [b]({ADDRESS}/blob/main/run.py) [c]({ADDRESS}/tree/main/docs) "
        f"![d](extra/images/plot.png) <img src='images/plot.png'> [e](#tool) [f](über.md) "
        "<a href='über.html#twice'>g</a> `[h](run.py)` "
        '[]{#a-b} `<a id="c"></a>`'
    )
    assert images == {"docs/plot.png"} and unknown == []
    assert on_site("README.md", "[a](gone.md)", files, tree)[2] == ["README.md:1: gone.md: there is no such file"]


def test_pages_are_laid_out_with_their_images(tree: Path, tmp_path: Path) -> None:
    (tree / "docs" / "Über.md").write_text("![a](plot.png)\n")
    wrong = lay_out(tmp_path / "site", tree)
    assert "docs/Über.md: is in no group of NAV (docs/making/pages.py)" in wrong
    assert "docs/merge.md: NAV names it (docs/making/pages.py), but there is no such file" in wrong
    files = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    assert files == {"index.md", "über.md", "extra/images/plot.png"}
    assert (tmp_path / "site" / "über.md").read_text() == "![a](extra/images/plot.png)\n"
    assert place("CODE_OF_CONDUCT.md") == "code-of-conduct.md"


def test_the_source_has_one_address() -> None:
    assert outside(source()) is None
    assert inside(f"{source()}/blob/main/docs/hub.md#a", "README.md", source()) == ("docs/hub.md", "a")
    raw = "https://raw.githubusercontent.com/them/tool/main/docs/plot.png"
    assert inside(raw, "README.md", "https://github.com/them/tool") == ("docs/plot.png", "")
