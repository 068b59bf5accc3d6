"""The links and anchors of a Markdown file, as GitHub reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BRANCH = "main"

_FENCE = re.compile(r"^ {0,3}(?:>\s?)*(`{3,}|~{3,}).*?(?:^ {0,3}(?:>\s?)*\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_LINKS = (
    re.compile(r"\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)"),  # [a](b "c")
    re.compile(r"^ {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s<>]+)>?", re.MULTILINE),  # [a]: b
    re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)\s*=\s*[\"']([^\"']*)[\"']"),
    re.compile(r"<(https?://[^\s<>]+)>"),
    re.compile(r"(?<![\w(<\"'\[/])(https?://[^\s<>)\]\"'|]*[^\s<>)\]\"'|.,;:!?])"),
)
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)
_ANCHOR = re.compile(r"<\w+\b[^>]*?\b(?:id|name)\s*=\s*[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Link:
    """A link in a file's text: `target` stands at `start` to `end`, in line `line` (from 1)."""

    target: str
    start: int
    end: int
    line: int


def without_code(text: str, spans: bool = True) -> str:
    """`text` with spaces for what is no prose, so that places stay the same: fenced blocks and comments, and code in a
    line unless `spans` is false."""
    for pattern in (_FENCE, _COMMENT, *([_CODE] if spans else [])):
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def links(text: str) -> list[Link]:
    """Every link and image of `text`, in order; an address that is found in two ways counts once."""
    prose = without_code(text)
    found: dict[int, tuple[str, int]] = {}
    for pattern in _LINKS:
        for match in pattern.finditer(prose):
            found.setdefault(match.start(1), (match[1], match.end(1)))
    return [Link(target, at, end, text.count("\n", 0, at) + 1) for at, (target, end) in sorted(found.items())]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: its text in lower case, without marks, with hyphens for spaces."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # the words of a link
    text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"(?<!\w)([*_]{1,3})(\S.*?\S|\S)\1(?!\w)", r"\2", text.replace("`", ""))
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def headings(text: str) -> list[tuple[int, str]]:
    """(level, text) of each heading."""
    prose = without_code(text, spans=False)
    return [(len(match[1]), match[2]) for match in _HEADING.finditer(prose)]


def anchors(text: str) -> set[str]:
    """What a link's "#…" can name in `text`."""
    seen: dict[str, int] = {}
    found = set(_ANCHOR.findall(without_code(text)))
    for _, heading in headings(text):
        name = slug(heading)
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found


def source(root: Path = ROOT) -> str:
    """The address of the source repository, from pyproject.toml; raises SystemExit if it is not there."""
    match = re.search(r"^Source\s*=\s*\"(https://[^\"]+?)/?\"", (root / "pyproject.toml").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit("pyproject.toml: [project.urls] has no Source; add the address of the repository")
    return match[1]


def inside(target: str, file: str, address: str) -> tuple[str, str] | None:
    """(path from the root, anchor) of a link in `file`, a path from the root, if it leads to a file of the repository:
    relative, or by the repository's `address` on the main branch. Raises ValueError if it leads out of it."""
    path, _, anchor = target.partition("#")
    for prefix in _prefixes(address):
        if path.startswith(prefix):
            return path.removeprefix(prefix).rstrip("/"), anchor
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", path):
        return None
    if not path:
        return file, anchor
    if path.startswith("/"):
        raise ValueError("begins with a slash, which means something else on every site")
    parts = file.split("/")[:-1]
    for part in path.split("/"):
        if part == ".." and not parts:
            raise ValueError("leads out of the repository")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts), anchor


def _prefixes(address: str) -> list[str]:
    """What the addresses of files begin with, which the README must have on a package index."""
    raw = address.replace("https://github.com/", "https://raw.githubusercontent.com/")
    return [*(f"{address}/{kind}/{BRANCH}/" for kind in ("blob", "tree", "raw")), f"{raw}/{BRANCH}/"]


def problems(root: Path, files: list[str]) -> list[str]:
    """What is wrong with the links of `files`, one line each; nothing is fetched."""
    address = source(root)
    texts: dict[str, set[str]] = {}
    found = []
    for file in files:
        text = (root / file).read_text()
        for link in links(text):
            if wrong := _problem(root, link.target, file, address, texts):
                found.append(f"{file}:{link.line}: {link.target or '(an empty link)'}: {wrong}")
    return found


def _problem(root: Path, target: str, file: str, address: str, texts: dict[str, set[str]]) -> str | None:
    try:
        place = inside(target, file, address)
    except ValueError as problem:
        return str(problem)
    if not target:
        return "leads nowhere"
    if place is None:
        return outside(target)
    path, anchor = place
    if not _is_there(root, path):
        return "there is no such file (names differ by case, too)"
    if anchor and path.endswith(".md"):
        known = texts.setdefault(path, set()) or anchors((root / path).read_text())
        texts[path] = known
        if anchor not in known:
            return f"{path} has no such heading; near: {_near(anchor, known)}"
    return None


def outside(target: str) -> str | None:
    """What is wrong with the form of an address."""
    if target.startswith("mailto:"):
        return None if re.fullmatch(r"mailto:[^@\s]+@[\w-]+(\.[\w-]+)+", target) else "is no address of mail"
    if target.startswith("http://"):
        return "use https"
    if not re.fullmatch(
        r"https://(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}(?::\d+)?(?:[/?#][^\s\"<>\\]*)?", target
    ):
        return "is no https address"
    return "has two slashes in its path" if "//" in target.removeprefix("https://") else None


def _is_there(root: Path, path: str) -> bool:
    """Whether the file or folder is there under just this name, on file systems that ignore case, too."""
    at = root
    for part in path.split("/") if path else ():
        if not at.is_dir() or part not in {child.name for child in at.iterdir()}:
            return False
        at /= part
    return True


def _near(anchor: str, known: set[str]) -> str:
    from difflib import get_close_matches

    return ", ".join(get_close_matches(anchor, known, 2, 0.4)) or "none"
