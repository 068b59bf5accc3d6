"""Names and code as Markdown, where nothing in them is markup."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any


def fenced(language: str, code: str) -> str:
    """A code block that nothing in `code` closes."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def plain(name: Any) -> str:
    """`name` in one line of Markdown, also in a table, as it reads: nothing in it is markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def string(name: str) -> str:
    """A Python string literal."""
    return json.dumps(name, ensure_ascii=False)


def word(name: str) -> str:
    """One word of a shell's line."""
    return shlex.quote("".join(c if c.isprintable() else "?" for c in name))


def number(value: Any, form: str) -> str:
    """A figure of a record in a format, or a dash for what is none."""
    good = isinstance(value, int if form == "d" else (int, float)) and not isinstance(value, bool)
    return format(value, form) if good else "–"


def short(name: str) -> str:
    """The last part of a repository's id."""
    return name.rpartition("/")[2]
