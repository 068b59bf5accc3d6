"""The pages of the site, and how they are laid out for Sphinx.

The pages are the repository's own Markdown files, which are also read on GitHub. Here each gets its place on the site:
the README becomes the home page, links between pages stay links between pages, and links to other files lead to the
source repository. `python -m making.pages FOLDER` writes them into FOLDER.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from making.links import BRANCH, ROOT, inside, links, source, without_code

NAV: dict[str, dict[str, str]] = {
    "Guides": {
        "docs/merge.md": "Merge",
        "docs/quantized.md": "Quantized bases",
        "docs/verify.md": "Verify",
        "docs/onnx.md": "ONNX",
        "docs/convert.md": "Convert",
        "docs/serving.md": "Serve",
        "docs/hub.md": "Publish on the Hub",
        "docs/scale.md": "Large models, many machines",
    },
    "Reference": {
        "docs/commands.md": "Commands and options",
        "docs/python.md": "Python",
        "docs/adapters.md": "Adapters",
        "docs/support.md": "Models: MiSS",
        "docs/support-lora.md": "Models: LoRA and DoRA",
        "docs/versions.md": "Versions",
        "docs/glossary.md": "Glossary",
    },
    "Proof": {
        "docs/parity.md": "Parity",
        "docs/gpu.md": "On a GPU",
        "docs/reliability.md": "Reliability",
        "docs/performance.md": "Performance",
        "docs/benchmarks.md": "Comparisons",
    },
    "Contributing": {
        "CONTRIBUTING.md": "How to contribute",
        "docs/extending.md": "Extend it",
        "docs/releasing.md": "Release",
        "benchmarks/README.md": "Benchmarks",
        "tests/loopback/README.md": "The loopback Hub",
        "CHANGELOG.md": "Changelog",
        "SECURITY.md": "Security",
        "CODE_OF_CONDUCT.md": "Code of conduct",
    },
}
"""What the side bar shows, in order; the README comes before."""

HOME = "README.md"
ELSEWHERE = {HOME: "index.md", "benchmarks/README.md": "measuring.md", "tests/loopback/README.md": "loopback-hub.md"}
IMAGES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")


def page_files(root: Path = ROOT) -> list[str]:
    """The Markdown files that are pages, as paths from `root`."""
    found = [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / name for name in ELSEWHERE)]
    return sorted({path.relative_to(root).as_posix() for path in found if path.is_file()})


def place(file: str) -> str:
    """The name of a page on the site."""
    return ELSEWHERE.get(file) or Path(file).name.lower().replace("_", "-")


def nav_problems(files: list[str]) -> list[str]:
    """Pages that no side bar shows, and names there that are no pages."""
    named = [HOME, *(file for group in NAV.values() for file in group)]
    places = [place(file) for file in files]
    return [
        *(f"{file}: is in no group of NAV (docs/making/pages.py)" for file in files if file not in named),
        *(
            f"{file}: NAV names it (docs/making/pages.py), but there is no such file"
            for file in named
            if file not in files
        ),
        *(f"{file}: another page has its place on the site" for file in files if places.count(place(file)) > 1),
    ]


def lay_out(folder: Path, root: Path = ROOT) -> list[str]:
    """Write all pages, and the images that they show, into `folder`, which is not there yet; say what is wrong."""
    files = page_files(root)
    wrong = nav_problems(files)
    (folder / "extra" / "images").mkdir(parents=True)
    for file in files:
        text, images, unknown = on_site(file, (root / file).read_text(), set(files), root)
        wrong += unknown
        (folder / place(file)).write_text(text + toctrees(files) if file == HOME else text)
        for image in images:
            (folder / "extra" / "images" / Path(image).name).write_bytes((root / image).read_bytes())
    return wrong


def on_site(file: str, text: str, files: set[str], root: Path) -> tuple[str, set[str], list[str]]:
    """A page's text with its links as they must be on the site; the images it shows; what its links name in vain."""
    address = source(root)
    images, wrong = set(), []
    for link in reversed(links(text)):
        try:
            there = inside(link.target, file, address)
        except ValueError as problem:
            wrong.append(f"{file}:{link.line}: {link.target}: {problem}")
            continue
        if there is None or link.target.startswith("#"):
            continue
        path, anchor = there
        if not (root / path).exists():
            wrong.append(f"{file}:{link.line}: {link.target}: there is no such file")
            continue
        if path in files:
            target = place(path) + (f"#{anchor}" if anchor else "")
        elif path.endswith(IMAGES):
            images.add(path)
            is_html = text[link.start - 1] in "\"'"  # which Sphinx takes as it is
            target = f"{'' if is_html else 'extra/'}images/{Path(path).name}"
        else:
            kind = "tree" if (root / path).is_dir() else "blob"
            target = f"{address}/{kind}/{BRANCH}/{path}" + (f"#{anchor}" if anchor else "")
        if target.endswith(".md") or ".md#" in target:
            target = _as_html(target) if text[link.start - 1] in "\"'" else target
        text = text[: link.start] + target + text[link.end :]
    return _with_places(text), images, wrong


def _with_places(text: str) -> str:
    """`<a id="x"></a>` in the form that Sphinx can link to."""
    for match in reversed(list(re.finditer(r"<a id=\"([\w-]+)\"></a>", without_code(text)))):
        text = f"{text[: match.start()]}[]{{#{match[1]}}}{text[match.end() :]}"
    return text


def _as_html(target: str) -> str:
    return target if target.startswith("https:") else re.sub(r"\.md(?=#|$)", ".html", target)


def toctrees(files: list[str]) -> str:
    """The side bar, which Sphinx takes from the home page."""
    groups = []
    for caption, named in NAV.items():
        pages = [f"{label} <{place(file).removesuffix('.md')}>" for file, label in named.items() if file in files]
        groups.append("\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]))
    return "".join(groups)


if __name__ == "__main__":
    for line in (problems := lay_out(Path(sys.argv[1]))):
        print(line, file=sys.stderr)
    sys.exit(bool(problems))
