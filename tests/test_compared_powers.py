"""Around powers of two, at which the steps of a dtype change: what NumPy and the compiled loops take for right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import compared_tools
import numpy as np
import pytest
from compared_tools import DTYPES, addend, agree, buffer, by_numpy, needs_compiler, use
from hypothesis import given, settings
from hypothesis import strategies as st

from fossil_export.verifying import _compiled
from fossil_export.verifying._compiled import Factor, multiplied, rebuilt, tiled
from fossil_export.verifying._values import compare_values

any_processor = compared_tools.any_processor
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinities, on purpose

EXPONENTS = {"BF16": (-133, -126, 127), "F16": (-24, -14, 15), "F32": (-149, -126, 127)}
"""Of the smallest number, the smallest normal one, and the largest power of two."""


def around_powers(rng: np.random.Generator, dtype: str, width: int, least: int) -> tuple[Any, Any, Any]:
    """Columns ±2^k (float32), what is added to them (`least` to 96 64ths of the steps below 2^k), and these steps."""
    smallest, normal, largest = EXPONENTS[dtype]
    some = rng.choice([smallest, smallest + 1, normal - 1, normal, normal + 1, largest], width)
    exponents = np.where(rng.random(width) < 0.3, some, rng.integers(smallest, largest + 1, width))
    if rng.random() < 0.5:
        exponents = rng.integers(-4, 5, width)
    steps = 2.0 ** np.maximum(exponents - normal - 1, 0) * 2.0**smallest
    signs = rng.choice([-1.0, 1.0], width)
    parts = np.where(rng.random(width) < 0.4, rng.choice([0, 2.0**-8, 2.0**-6, 32, 64], width), 0)
    parts = np.where(rng.random(width) < 0.6, rng.integers(least, 97, width), parts)
    return (signs * 2.0**exponents).astype(np.float32), (signs * steps * parts / 64).astype(np.float32), steps


def neighbours(exact: Any, dtype: str) -> tuple[Any, Any]:
    """Numbers (3, n) around exact values, and which of them are the nearest ones: two of a tie."""
    kind = np.dtype(DTYPES[dtype])
    nearest = exact.astype(kind)
    found = np.stack([nearest, *(np.nextafter(nearest, kind.type(side * np.inf)) for side in (-1, 1))])
    far = np.abs(found.astype(np.float64) - exact)
    return found, far == far.min(0)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 2]), st.sampled_from(list(DTYPES)))
def test_around_powers_of_two_the_nearest_numbers_alone_are_right(seed: int, processor: int, dtype: str) -> None:
    """By NumPy and by all loops, after a row that is as far off as rounding twice may make it."""
    use(processor)
    rng = np.random.default_rng(seed)
    stored, added, _ = around_powers(rng, dtype, width := 40, -96)
    exact = stored.astype(np.float64) + added
    found, right = neighbours(exact, dtype)
    take = np.argmax(rng.random(right.shape) * right, axis=0)
    good = np.take_along_axis(found, take[None], 0)[0]
    wrong = np.argwhere(~right & np.isfinite(found))
    which, at = wrong[rng.integers(len(wrong))]
    bad = good.copy()
    bad[at] = found[which, at]
    start = int(rng.integers(1, 7))  # rows that are not sampled are compared in float32 first
    one, far = np.ones(width, np.float32), np.zeros(width)
    far[0] = (0.5 + 2.0**-11) * float(np.spacing(found.dtype.type(1)))
    stored, tile = np.stack([one, stored]), np.stack([far.astype(np.float32), added])
    exact, factor = stored.astype(np.float64) + tile, Factor(tile.T)
    first = np.eye(2, dtype=np.float32)
    change = addend("tile", {"D": tile.T}, {"r": width})
    lora = addend("lora", {"A": tile, "B": first}, {"scale": 1.0, "r": 2})
    for row, is_right in ((good, True), (bad, False)):
        values = np.stack([one.astype(found.dtype), row])
        numpy = by_numpy(start, stored, values, dtype, [change])
        with_bound = by_numpy(start, stored, values, dtype, [lora])
        assert numpy.off == with_bound.off == (0 if is_right else 1)
        if _compiled.loops() is None:
            continue
        agree(tiled(start, stored, values, tile, 0), numpy)
        agree(rebuilt(start, stored, values, exact, None), numpy)
        agree(multiplied(start, stored, values, first, factor, 1.0, buffer), with_bound, nearly=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 2]), st.sampled_from(list(DTYPES)))
def test_around_powers_of_two_a_rounding_within_the_bound_is_right(seed: int, processor: int, dtype: str) -> None:
    use(processor)
    rng = np.random.default_rng(seed)
    stored, added, steps = around_powers(rng, dtype, 40, 0)
    exact = stored.astype(np.float64) + added
    bound = steps * rng.integers(0, 129, len(steps)) / 64
    computed = exact + bound * rng.choice([-1.0, -0.75, 0.5, 1.0], len(steps))
    found = computed.astype(DTYPES[dtype])[None]
    job: Any = SimpleNamespace(part=SimpleNamespace(dtype="F32"), found=SimpleNamespace(dtype=dtype))

    def rebuild(_: Any, weight: Any, rows: Any, wide: bool) -> Any:
        rows[:] = exact
        return bound[None].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fossil_export.verifying._values.rebuild", rebuild)
        numpy = compare_values(job, 0, stored[None], found, [addend("tile", {}, {})], buffer)[0]
    assert numpy.off == 0
    if _compiled.loops() is not None:
        agree(rebuilt(0, stored[None], found, exact[None], bound[None]), numpy)


@needs_compiler
@pytest.mark.parametrize("processor", [0, 1, 2])
def test_a_product_just_above_a_power_of_two_and_a_value_just_below_it(processor: int) -> None:
    """After a row that is as far off as rounding twice may make it, float32 could take it for half a step."""
    use(processor)
    stored, kind = np.ones((2, 8), np.float32), DTYPES["BF16"]
    added = np.array([[(0.5 + 2.0**-11) * 2.0**-7, *[0.0] * 7], [2.0**-20] * 8], np.float32)
    found, first, factor = stored.astype(kind), np.eye(2, dtype=np.float32), Factor(added.T)
    assert multiplied(1, stored, found, first, factor, 1.0, buffer) is not None
    assert factor._wide is None
    found[1, 5] = np.nextafter(kind(1), kind(0))
    assert multiplied(1, stored, found, first, factor, 1.0, buffer) is None


@needs_compiler
@pytest.mark.parametrize("processor", [0, 1, 2])
def test_a_product_within_its_bound_below_a_power_of_two_is_right(processor: int) -> None:
    use(processor)
    exact, one = np.array([1.0, -1.0, 4.0, -0.125], np.float32), np.ones((1, 1), np.float32)
    stored, added = -exact[None], 2 * exact[None]
    change = addend("lora", {"A": added, "B": one}, {"scale": 1.0, "r": 1})
    for share in (0.0, 0.3, 0.5, 0.7, 1.0):
        found = (exact * (1 - share * 3 * 2.0**-23)).astype(np.float32)[None]
        sums = multiplied(1, stored, found, one, Factor(added.T), 1.0, buffer)
        assert sums is not None and sums.worst <= 0.5
        agree(sums, by_numpy(1, stored, found, "F32", [change]), nearly=True)
