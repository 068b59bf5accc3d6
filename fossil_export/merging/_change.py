"""What a merge does to a tensor: the updates of trained modules, at their weights, in the matrices that it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fossil_export.adapters import Trained
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.merging._survival import group_rows
from fossil_export.methods import METHODS, Method


@dataclass(frozen=True)
class Change:
    """`weight` times the update of `trained`, a module of the plan's adapter number `adapter`, goes `into` a matrix."""

    adapter: int
    trained: Trained
    into: Matrix
    weight: float = 1.0

    @property
    def method(self) -> Method:
        return METHODS[self.trained.method]


@dataclass(frozen=True)
class Part:
    """Elements [first, last) of a tensor: one matrix with its `changes`, or values that stay as they are.

    They are cut into `rows`: those of the matrix, however it lies; a tensor of two dimensions' own; else elements.
    """

    first: int
    last: int
    rows: int
    changes: tuple[Change, ...] = ()

    @property
    def matrix(self) -> Matrix:
        """What the changes go into."""
        return self.changes[0].into

    @property
    def width(self) -> int:
        """Elements of a row."""
        return (self.last - self.first) // max(1, self.rows)

    @property
    def sampled(self) -> int:
        """Rows that are merged and measured together."""
        return group_rows(math.lcm(*(change.method.block_rows(change.trained.shapes) for change in self.changes)))

    @property
    def unit(self) -> int:
        """Rows that must not be cut apart."""
        return self.matrix.unit(self.sampled) if self.changes else 1


def parts_of(shape: tuple[int, ...], changes: Sequence[Change]) -> Iterator[Part]:
    """A tensor of this shape, cut at the edges of the matrices in it that change."""
    count = element_count(shape)
    if not changes:
        yield Part(0, count, shape[0] if len(shape) == 2 else count)
        return
    matrices: dict[tuple[int, int], list[Change]] = {}
    for change in changes:
        matrices.setdefault(change.into.span, []).append(change)
    end = 0
    for (first, last), own in sorted(matrices.items(), key=lambda entry: entry[0]):
        assert first >= end, f"two matrices overlap in {own[0].into.stored[0].name}"
        if first > end:
            yield Part(end, first, first - end)
        yield Part(first, last, own[0].into.shape[0], tuple(own))
        end = last
    if end < count:
        yield Part(end, count, count - end)
