"""What rounding left of the update.

A bfloat16 weight keeps 8 bits, so W + ΔW rounds back to W where ΔW is less than half a step of W. Per
weight, over a fixed sample of its rows, with W' the stored result:

    survived = <W' - W, ΔW> / <ΔW, ΔW>        1 when nothing was lost, 0 when all was
    energy   = |W' - W|² / |ΔW|²              above 1 when rounding noise was added
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLE_ROWS = 64
"""Rows per weight that are measured, evenly spaced; all of them where there are no more."""

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
        """Estimate for a whole weight of which 1/`factor` was sampled."""
        return Survival(self.kept * factor, self.update * factor, self.moved * factor)

    @property
    def survived(self) -> float | None:
        """Share of the update that is in the result; None when there was no update (an untrained shard)."""
        return self.kept / self.update if self.update else None

    @property
    def energy(self) -> float | None:
        return self.moved / self.update if self.update else None

    def to_dict(self) -> dict[str, float | None]:
        return {"survived": self.survived, "energy": self.energy}


def sample_starts(out_features: int, unit: int) -> range:
    """First rows of the sampled groups of `unit` rows (the rows a variant merges together)."""
    groups = out_features // unit
    step = max(1, groups // max(1, SAMPLE_ROWS // unit))
    return range(0, groups * unit, step * unit)


def measure(before: Any, update: Any, after: Any) -> Survival:
    """Sums for rows W, ΔW and W' (n, in), as NumPy arrays in the precision of the merge."""
    import numpy as np

    moved = after.astype(np.float64) - before
    wanted = update.astype(np.float64)
    return Survival(float((moved * wanted).sum()), float((wanted * wanted).sum()), float((moved * moved).sum()))
