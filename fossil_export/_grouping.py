"""Rows that differ only in the numbers in their names, as one: `model.layers.{0–29}.self_attn.q_proj` × 30."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
# A whole component of a dotted name: layers and experts are numbered so, `conv1` is not.

_HOLE = "\0"

SHOWN = 4
"""Runs of numbers that are written out."""


@dataclass(frozen=True)
class Group:
    """Rows of the same kind: `cells` with ranges in the place of numbers, and the rows' places in what was grouped."""

    cells: tuple[str, ...]
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)


def grouped(rows: Iterable[Sequence[str]]) -> list[Group]:
    """Group `rows` by all of their cells but for the numbers in them, in the order of each group's first row.

    >>> [group.cells for group in grouped([("layers.0.q", "8x4"), ("layers.1.q", "8x4"), ("head", "9x4")])]
    [('layers.{0–1}.q', '8x4'), ('head', '9x4')]
    """
    found: dict[tuple[str, ...], list[tuple[int, Sequence[str]]]] = {}
    for place, row in enumerate(rows):
        found.setdefault(tuple(_NUMBER.sub(_HOLE, cell) for cell in row), []).append((place, row))
    return [
        Group(
            tuple(_named(kind, [row[column] for _, row in members]) for column, kind in enumerate(kinds)),
            tuple(place for place, _ in members),
        )
        for kinds, members in found.items()
    ]


def _named(kind: str, names: list[str]) -> str:
    """`kind` with the numbers that stand in `names` at each hole."""
    numbers = zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True)
    ranges = iter([_ranges(sorted(set(column))) for column in numbers])
    return "".join(part if part != _HOLE else next(ranges) for part in re.split(f"({_HOLE})", kind))


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = ["–".join(map(str, run)) for run in runs[:SHOWN]]
    return "{" + ",".join([*texts, *(["…"] if len(runs) > SHOWN else [])]) + "}"
