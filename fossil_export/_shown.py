"""How plans and results show themselves: a line for a prompt, a small table for a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

LONGEST = 200
"""Letters of a value that are shown, or of a name in a line."""
ROWS = 8
"""Of warnings and the like."""

Rows = Iterable[tuple[str, object]]

_SECRETS = re.compile(r"(?<=://)[^\s/@]+(?=@)|(?<=\?)\S+|\bhf_\w{6,}")


def without_secrets(name: str | None) -> str | None:
    """A name from a file, which may be an address: without its password, its query (which may be signed) and tokens."""
    return name if name is None else _SECRETS.sub("…", name)


def printable(text: str) -> str:
    """Names of files and tensors may hold anything; what a terminal would obey is shown as Python writes it, and so is
    a new line."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def short(value: object) -> str:
    """A value, cut in the middle if it is long: of a path and a name, both ends tell."""
    text = printable(str(value))
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half + 1 :]}"


def line(kind: str, text: str) -> str:
    """What `repr` gives: one line, short however much there is."""
    text = printable(text)
    return f"<{kind} {text if len(text) <= 4 * LONGEST else text[: 4 * LONGEST] + '…'}>"


def readable_bytes(count: int) -> str:
    """Decimal units, as disks and the Hub count them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def table(title: str, rows: Rows, warnings: Sequence[str] = (), kind: str = "Warnings") -> str:
    """A table in HTML of names and values, those that are None or empty left out.

    It takes the notebook's own colours, so that it can be read on light and dark; every text is escaped, for names of
    tensors come from anywhere.
    """
    found = [(name, short(value)) for name, value in rows if value not in (None, "")]
    cells = [
        f'<tr><th scope="row" style="text-align:left;font-weight:normal;opacity:.75">{escape(name)}</th>'
        f'<td style="text-align:left;overflow-wrap:anywhere">{escape(value)}</td></tr>'
        for name, value in found
    ]
    more = [*map(short, warnings[:ROWS])]
    more += [f"and {len(warnings) - ROWS} more"] if len(warnings) > ROWS else []
    listed = "".join(f'<li style="overflow-wrap:anywhere">{escape(line)}</li>' for line in more)
    below = f'<div>{escape(kind)}:<ul style="margin-top:0">{listed}</ul></div>' if more else ""
    caption = '<caption style="text-align:left;font-weight:bold;color:inherit">'
    return (
        f'<div style="max-width:60em"><table>{caption}{escape(short(title))}</caption><tbody>{"".join(cells)}'
        f"</tbody></table>{below}</div>"
    )
