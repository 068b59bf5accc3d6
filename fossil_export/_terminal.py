"""What stderr and stdout take: bars and status lines, colours, escape sequences; and how much the user wants to see.

The environment's words are those of no-color.org and of bixense.com/clicolors: NO_COLOR with any value, FORCE_COLOR and
CLICOLOR_FORCE with any but 0. TERM=dumb is a terminal that obeys nothing.
"""

from __future__ import annotations

import os
import shutil
import sys

quiet = False
"""Set by --quiet: nothing but errors and warnings on stderr, and no tables on stdout."""

verbose = False
"""Set by --verbose: lines on stderr of what is done."""


def watched() -> bool:
    """Whether somebody looks at stderr, and wants to be told how far we are."""
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


def live() -> bool:
    """Whether a bar or a status line can be drawn there, which writes over itself."""
    return watched() and os.environ.get("TERM") != "dumb"


def colours() -> bool | None:
    """Whether to colour what is printed; None: if it goes to a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return False if os.environ.get("TERM") == "dumb" else None


def erasing() -> str:
    """What clears the line that a bar or a status line stands on; without escape sequences if there must be none."""
    if not live():
        return ""
    return f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r" if os.environ.get("NO_COLOR") else "\r\x1b[K"


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    import unicodedata  # commands must start fast

    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def padded(text: str, columns: int, right: bool = False) -> str:
    """`text` with spaces to that many columns, after it or before it."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces
