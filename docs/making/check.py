"""Whether a built site holds together: `python -m making.check FOLDER`.

Every link, anchor, image, style and script must be in the folder, every page must be reached from the home page, and a
page may load nothing from elsewhere. Links to other sites are looked at for their form.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from making.links import outside

LOADED = {"script": "src", "img": "src", "link": "href", "source": "srcset", "iframe": "src", "video": "src"}
MADE = {"genindex.html", "search.html"}
"""Pages of Sphinx's own, which are not in the side bar."""


class Page(HTMLParser):
    """The ids of a page, what it links to and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if (value := given.get(LOADED.get(tag, ""))) and given.get("rel") not in (
            "canonical",
            "next",
            "prev",
            "author",
        ):
            self.loads.add(value)


def problems(folder: Path) -> list[str]:
    """What is wrong, one line each."""
    pages = {path.relative_to(folder).as_posix(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found, reached = [], {"index.html"}
    for name, page in pages.items():
        for target in sorted(page.links | page.loads):
            if re.match(r"https?:|mailto:|//", target):
                wrong = "is loaded from elsewhere" if target in page.loads else outside(target)
            else:
                there, wrong = _local(folder, name, target, pages)
                reached.add(there)
            if wrong:
                found.append(f"{name}: {target}: {wrong}")
    for sheet in folder.rglob("*.css"):
        for address in re.findall(
            r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import\s+['\"](http[^'\"]+)", sheet.read_text()
        ):
            found.append(f"{sheet.relative_to(folder)}: {''.join(address)}: is loaded from elsewhere")
    found += [f"{name}: no page leads here" for name in pages if name not in reached and name not in MADE]
    return found or ([] if len(pages) > len(MADE) else [f"{folder}: no pages are there"])


def _local(folder: Path, name: str, target: str, pages: dict[str, Page]) -> tuple[str, str | None]:
    """The file that a link of page `name` leads to, and what is wrong with it."""
    path, _, anchor = target.partition("#")
    path = unquote(path.partition("?")[0])
    file = (folder / name).parent / path if path else folder / name
    there = Path(re.sub(r"[^/]+/\.\./", "", file.as_posix())).relative_to(folder).as_posix()
    if not file.is_file():
        return there, "there is no such file"
    if anchor and there in pages and unquote(anchor) not in pages[there].ids:
        return there, "there is no such anchor"
    return there, None


if __name__ == "__main__":
    for line in (wrong := problems(Path(sys.argv[1]))):
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))
