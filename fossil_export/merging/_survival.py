"""What rounding left of the update.

A bfloat16 weight keeps 8 bits, so W + ΔW rounds back to W where ΔW is less than half a step of W. Per
weight, over a fixed sample of its rows, with W' the stored result:

    survived = <W' - W, ΔW> / <ΔW, ΔW>        1 when nothing was lost, 0 when all was
    energy   = |W' - W|² / |ΔW|²              above 1 when rounding noise was added
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fossil_export.kernels._rows import measure_rows

SAMPLE_ROWS = 64
"""Rows per weight that are measured, in evenly spaced groups; all of them where there are no more."""

GROUP_ROWS = 8
# Neighbouring rows measured at a time: row by row, the calls would cost more than the arithmetic.

WARNING_BELOW = 0.9
"""Share of the whole update under which the user is warned."""


@dataclass(frozen=True)
class Survival:
    """Sums over sampled elements: `kept` = <W' - W, ΔW>, `update` = |ΔW|², `moved` = |W' - W|²."""

    kept: float = 0.0
    update: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(self.kept + other.kept, self.update + other.update, self.moved + other.moved)

    def scaled(self, factor: float) -> Survival:
        """Estimate for `factor` times as many elements."""
        return Survival(self.kept * factor, self.update * factor, self.moved * factor)

    @property
    def survived(self) -> float | None:
        """Share of the update that is in the result; None when there was no update (an untrained shard)."""
        return self.kept / self.update if self.update else None

    @property
    def energy(self) -> float | None:
        return self.moved / self.update if self.update else None

    @classmethod
    def from_dict(cls, sums: Mapping[str, Any]) -> Survival:
        """From `vars` of one that was kept as JSON; raises an error of Python's for what that never was."""
        found = cls(**{name: float(value) for name, value in sums.items()})
        if any(map(math.isnan, vars(found).values())):
            raise ValueError("no sums")
        return found

    def to_dict(self) -> dict[str, float | None]:
        return {"survived": self.survived, "energy": self.energy}


def group_rows(unit: int) -> int:
    """Rows in a sampled group of a variant that merges `unit` rows together."""
    return unit * max(1, GROUP_ROWS // unit)


def sample_starts(out_features: int, group: int) -> range:
    """First rows of the sampled groups of `group` rows in a weight with `out_features` rows; the last may be short."""
    groups = -(-out_features // group)
    step = max(1, groups // max(1, SAMPLE_ROWS // group))
    return range(0, out_features, step * group)


def sampled_share(out_features: int, group: int) -> float:
    """Share of a weight's rows that its sample covers."""
    return sum(min(group, out_features - start) for start in sample_starts(out_features, group)) / out_features


def measure(before: Any, update: Any, after: Any) -> Survival:
    """Sums for rows W, ΔW and W' (n, in), as NumPy arrays in the precision of the merge."""
    import numpy as np

    found = measure_rows(before, update, after)
    if found is not None:
        return Survival(*found)
    moved = after.astype(np.float64) - before
    wanted = update.astype(np.float64)
    return Survival(float((moved * wanted).sum()), float((wanted * wanted).sum()), float((moved * moved).sum()))
