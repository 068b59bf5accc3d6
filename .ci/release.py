"""The section of CHANGELOG.md for a release, or what stops it: `release.py v0.2.0`.

The tag must be the version in fossil_export/version.py and CITATION.cff, its section must have a date, and nothing may
be left under Unreleased.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def section(text: str, name: str) -> "tuple[str, str] | None":
    """What stands beside a heading, and below it; None if there is no such section."""
    found = re.search(rf"^## \[?{re.escape(name)}\]?(.*)\n((?:(?!^## ).*\n?)*)", text, re.MULTILINE)
    return None if found is None else (found[1].strip(" –-"), found[2].strip())


def notes(tag: str, root: Path = ROOT) -> str:
    version = tag.removeprefix("v")
    for name, pattern in (("fossil_export/version.py", r'"(.+)"$'), ("CITATION.cff", r"^version: (.+)$")):
        told = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        if told is None or told[1] != version:
            raise SystemExit(f"{name}: is {told and told[1]}, and the tag is {tag}; make them the same")
    text = (root / "CHANGELOG.md").read_text()
    if (left := section(text, "Unreleased")) is not None and left[1]:
        raise SystemExit(f"CHANGELOG.md: has lines under Unreleased; move them to {version}")
    found = section(text, version)
    if found is None or not found[1]:
        raise SystemExit(f"CHANGELOG.md: has no section {version}; write it")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", found[0]) is None:
        raise SystemExit(
            f"CHANGELOG.md: {version} has no date; put it beside the heading, as in {version} – 2026-12-01"
        )
    return found[1] + "\n"


if __name__ == "__main__":
    print(notes(sys.argv[1]), end="")
