"""Rows that were stored against what they must be, by NumPy: what compare.c does in one pass, and what tells which
elements are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fossil_export.verifying._job import Job, Sums
from fossil_export.verifying._rebuilding import Addend, rebuild
from fossil_export.verifying.reference._ulp import step

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

TOLERANCE = 2.0**-10
"""Steps beyond half of one that rounding to float32 before rounding to 16 bits can cost."""

ALLOWED = 0.5 + TOLERANCE

SAMPLED = 8
"""One row in so many is measured for the survival of the update."""

LANES = 8
"""Sums that are kept side by side, one for each column modulo this, so that both ways add up in one order."""

Buffer = Callable[[str, int], "Array"]
"""Bytes of the thread that asks, under a name, to be used again."""


def compare_values(
    job: Job, start: int, stored: Array, found: Array, addends: Sequence[Addend], buffer: Buffer
) -> tuple[Sums, Array | None]:
    """Compare rows `stored` of the base, from row `start` on, with the `addends` put to them, with those `found`.

    The second result marks the wrong elements, if there are any; `first` of the sums is not set.
    """
    import numpy as np

    count = found.size
    # Four arrays used over and over: allocating them for every block would cost more than the arithmetic.
    space = buffer("space", 4 * count * 8).view(np.float64)
    weight, got, exact, steps = space.reshape(4, *found.shape)
    np.copyto(weight, stored)
    np.copyto(got, found)
    bound, kept, update = None, 0.0, 0.0
    if addends:
        bound = rebuild(addends, weight, exact, job.part.dtype == "F64")
    else:
        np.copyto(exact, weight)
    if addends:
        kept, update = survival(start, weight, got, exact)
    else:
        # A base may hold infinities (masks), whose cast is compared as it is.
        alike = ~np.isfinite(exact) & ((got == exact) | np.isnan(got) & np.isnan(exact))
        got[alike] = exact[alike] = 0.0
    step(exact, got, job.found.dtype, steps, weight)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.subtract(got, exact, out=got)
        np.abs(error, out=error)
        error /= steps
        if bound is not None:
            error = counted(error, np.divide(bound, steps, out=bound))
    furthest = float(error.max())  # NaN if any is
    worst = furthest if furthest == furthest else float("inf")
    if furthest <= ALLOWED:
        return Sums(worst, 0, kept, update), None
    wrong = ~(error <= ALLOWED)
    return Sums(worst, int(np.count_nonzero(wrong)), kept, update), wrong


def counted(error: Array, bound: Array) -> Array:
    """An error in steps as it counts: what the float32 products may cost (`bound`, in steps) excuses what is over half
    of one."""
    import numpy as np

    found: Array = np.where(error <= 0.5, error, np.maximum(0.5, error - bound))
    return found


def survival(start: int, weight: Array, got: Array, exact: Array) -> tuple[float, float]:
    """<W' - W, ΔW> and |ΔW|² of the sampled ones of rows that begin at row `start`."""
    import numpy as np

    some = slice(-start % SAMPLED, None, SAMPLED)
    with np.errstate(invalid="ignore", over="ignore"):
        change = exact[some] - weight[some]
        return _sum((got[some] - weight[some]) * change), _sum(change * change)


def _sum(products: Array) -> float:
    import numpy as np

    rows, width = products.shape
    lanes = np.zeros((rows, -(-width // LANES) * LANES))
    lanes[:, :width] = products
    return sum(np.add.reduce(lanes.reshape(-1, LANES), axis=0).tolist(), 0.0)
