"""Tables and pairs within the width of a terminal; what goes into a file or a pipe stays as it is."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence

from fossil_export import _console
from fossil_export._terminal import width

GAP = 2
NARROWEST = 12
"""What a column keeps at least, in characters."""

Row = Sequence[str]


def print_table(header: Row, rows: Sequence[Row], less: Sequence[str] = ()) -> None:
    """A table; on a terminal that is too narrow without the columns `less`, then with cells of several lines."""
    _console.print_table(*fitted(header, rows, room(), less))


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values; on a terminal a long value goes on below where it began."""
    _console.print_pairs(hanging(pairs, room()))


def room() -> int | None:
    """Columns of the terminal that stdout is, None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(header: Row, rows: Sequence[Row], most: int | None, less: Sequence[str] = ()) -> tuple[Row, list[Row]]:
    """The table in `most` columns, if that can be: first the columns named in `less` go, then the widest are folded.

    >>> fitted(("name", "size"), [("model.layers.0.mlp.weight", "8")], 24)
    (('name', 'size'), [('model.layers.0.', '8'), ('  mlp.weight', '')])
    """
    header, found = tuple(header), [tuple(map(_console.printable, row)) for row in rows]
    for name in less:
        if most is not None and name in header and _total(_widths(header, found)) > most:
            place = header.index(name)
            header, found = _without(header, place), [_without(row, place) for row in found]
    widths = _widths(header, found)
    if most is None or _total(widths) <= most:
        return header, list(found)
    # Names are folded only if words do not suffice.
    for worded in (True, False):
        places = [one for one in range(len(header)) if worded == any(" " in row[one] for row in found)]
        while places and _total(widths) > most:
            place = max(places, key=lambda one: widths[one] - width(header[one]))
            if widths[place] <= max(NARROWEST, width(header[place])):
                places.remove(place)
            else:
                widths[place] -= 1
    lines: list[Row] = []
    for row in found:
        cells = [_folded(cell, wide) for cell, wide in zip(row, widths, strict=True)]
        depth = max(map(len, cells))
        lines += [tuple(cell[level] if level < len(cell) else "" for cell in cells) for level in range(depth)]
    return header, lines


def hanging(pairs: Sequence[tuple[str, str]], most: int | None) -> list[tuple[str, str]]:
    """Values that are too long go on in pairs without a name. Only spaces are broken, so that a path or an address can
    still be copied.

    >>> hanging([("reason", "it is much too long"), ("time", "2 s")], 20)
    [('reason', 'it is much'), ('', 'too long'), ('time', '2 s')]
    """
    wide = max((width(name) for name, _ in pairs), default=0) + GAP
    if most is None or most - wide < NARROWEST:
        return list(pairs)
    found = []
    for name, value in pairs:
        first, *rest = _packed(re.findall(r" *[^ ]+", value) or [value], most - wide, "")
        found += [(name, first), *(("", line) for line in rest)]
    return found


def _folded(cell: str, most: int) -> list[str]:
    """Broken after dots, slashes, commas and spaces, the following lines two to the right."""
    if width(cell) <= most:
        return [cell]
    return _packed(re.findall(r"[^./, _]*(?:[./,_] *| +)|[^./, _]+", cell), most, "  ")


def _packed(pieces: Sequence[str], most: int, indent: str) -> list[str]:
    lines, current = [], ""
    for piece in pieces:
        if current.strip() and width((current + piece).rstrip()) > most:
            lines.append(current.rstrip())
            current = indent + piece.lstrip()
        else:
            current += piece
    return [*lines, current.rstrip()]


def _widths(header: Row, rows: Sequence[Row]) -> list[int]:
    return [max(map(width, column)) for column in zip(header, *rows, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _without(row: tuple[str, ...], place: int) -> tuple[str, ...]:
    return row[:place] + row[place + 1 :]
