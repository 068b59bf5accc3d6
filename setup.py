"""The long description for the package index: README.md with addresses in the place of its relative links.

README.md itself has relative links, which are right in a clone, on the forge and in the documentation. All else
about the package stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

SOURCE = "https://github.com/fossil-export/fossil-export"
RAW = "https://raw.githubusercontent.com/fossil-export/fossil-export"

HERE = Path(__file__).parent
IMAGES = (".png", ".svg", ".gif", ".jpg", ".jpeg", ".webp")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
# [text](target), also around an image; [name]: target; and HTML's src, srcset and href.
LINK = re.compile(r'(?<=\]\()([^)\s]+)|(?<=\]: )(\S+)|(?<=\bsrc=")([^"]+)|(?<=\bsrcset=")([^"]+)|(?<=\bhref=")([^"]+)')


def absolute(text: str, version: str) -> str:
    """Markdown `text` with each relative link as an address of the files of release `version`; code stays as it is."""

    def address(match: "re.Match[str]") -> str:
        target = match[0]
        if re.match(r"[a-z]+:", target):
            return target
        path, sign, anchor = target.partition("#")
        path = path.removeprefix("./").rstrip("/") or "README.md"
        if path.endswith(IMAGES):
            return f"{RAW}/v{version}/{path}"
        kind = "tree" if (HERE / path).is_dir() else "blob"
        return f"{SOURCE}/{kind}/v{version}/{path}{sign}{anchor}"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(address, part) for part in parts)


class Metadata(egg_info):
    """The metadata of wheel and sdist, both of which are made from it."""

    def run(self) -> None:
        found = self.distribution.metadata
        found.long_description = absolute(found.long_description, found.version)
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"egg_info": Metadata})
