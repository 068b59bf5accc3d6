"""The fast rounding of float32, against NumPy's casts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fossil_export.checkpoints._rounding import round_to_bfloat16, rounded

NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from(sorted(NUMPY)))
def test_any_floats_are_rounded_as_numpy_does(values: list[float], dtype: str) -> None:
    drawn = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        wanted = drawn.astype(NUMPY[dtype])
    found = rounded(drawn.copy(), dtype)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))
    numbers = ~np.isnan(drawn)
    assert (np.signbit(found) == np.signbit(wanted))[numbers].all()


@pytest.mark.parametrize("towards", [None, np.inf, -np.inf])
def test_every_number_of_float16_and_every_middle_of_two_is_rounded_right(towards: float | None) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = np.sort(numbers[np.isfinite(numbers)]).astype(np.float32)
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
    if towards is not None:
        values = np.nextafter(values, np.float32(towards))
    np.testing.assert_array_equal(rounded(values.copy(), "F16"), values.astype(np.float16))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_bfloat16_in_place_is_the_cast(values: list[float]) -> None:
    wide = np.array(values, np.float32)
    want = wide.astype(ml_dtypes.bfloat16).astype(np.float32)
    round_to_bfloat16(wide, np.empty(wide.shape, np.uint32))
    assert np.array_equal(wide, want)
