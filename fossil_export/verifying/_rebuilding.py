"""Rows of a weight with all that was trained for them, in float64, and what float32 may make of it.

The checks of the methods (`reference/`) know one update at a time; here they are put one after the other, each at its
weight, w (f(W) - W) for an update f. The bounds go along: beside its own, each update has the errors of those before it
to carry, and each sum but the last is rounded once more than an exact result would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.merging._change import Change
from fossil_export.methods import METHODS, Numbers
from fossil_export.verifying.reference import EXACT, Exact

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Addend:
    """A change, what some rows need of its tensors, in float64, and its numbers (`Change.numbers`)."""

    change: Change
    arrays: Mapping[str, Array]
    numbers: Numbers

    @property
    def exact(self) -> Exact:
        return EXACT[self.change.trained.method]

    def part(self, start: int, stop: int) -> Addend:
        """What the rows [start, stop) of these rows need."""
        return Addend(self.change, self.exact.part(self.arrays, start, stop), self.numbers)

    def rebuild(self, weight: Array, exact: Array) -> Array | None:
        """W' of rows of W, written into `exact`; the bound on float32's error, None for a single rounding."""
        return self.exact.rebuild(weight, self.arrays, self.numbers, exact)

    def scaled(self, weight: Array, exact: Array, unit: float) -> Array | None:
        """The same with the change at its weight."""
        bound, times = self.rebuild(weight, exact), self.change.weight
        if times == 1.0:
            return bound
        exact -= weight
        exact *= times
        # The weight is rounded to the arithmetic's numbers, and so is the product.
        more: Array = abs(exact) * (2.0 * unit)
        exact += weight
        return more if bound is None else more + bound * abs(times)

    def carried(self, error: Array) -> Array:
        """What this update makes of an error in the weight that it sees."""
        import numpy as np

        if METHODS[self.change.trained.method].COMBINES == "sum":
            return error
        # What depends on the weight is affine in it. A bound is a multiple, 2u or more, of the sizes of all terms: what
        # an error adds to it, over 2u, is no less than what these terms make of the error.
        with_error, without = np.empty_like(error), np.empty_like(error)
        more, less = self.rebuild(error, with_error), self.rebuild(np.zeros_like(error), without)
        if more is None or less is None:
            found: Array = np.abs(with_error - without)
            return found
        carried: Array = (more - less) / 2.0**-23
        return carried


def rebuild(addends: Sequence[Addend], weight: Array, exact: Array, wide: bool) -> Array | None:
    """Write the exact W' of rows of W (n, in) into `exact`; returns the bound, as `Exact.rebuild` does.

    `wide` says that the merge computed in float64.
    """
    import numpy as np

    unit = 2.0**-53 if wide else 2.0**-24
    bound = addends[0].scaled(weight, exact, unit)
    for addend in addends[1:]:
        before = exact.copy()
        error = np.abs(before) * unit  # of the sum so far, which is not the last one
        if bound is not None:
            error += bound
        own = addend.scaled(before, exact, unit)
        bound = addend.carried(error)
        if own is not None:
            bound = bound + own
    return bound
