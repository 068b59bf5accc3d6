"""What a merge does to a matrix: the update of one trained module, at a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fossil_export.adapters import Trained
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.merging.survival import group_rows
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


def sampled_rows(changes: Sequence[Change]) -> int:
    """Rows of a matrix that are merged and measured together."""
    return group_rows(math.lcm(*(change.method.block_rows(change.trained.shapes) for change in changes)))
