"""Rows of weights compared by the compiled loops and by NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fossil_export.adapters import Trained
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._plain import Plain
from fossil_export.merging._change import Change
from fossil_export.verifying import _compiled
from fossil_export.verifying._job import Sums
from fossil_export.verifying._rebuilding import Addend
from fossil_export.verifying._values import compare_values

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
needs_compiler = pytest.mark.skipif(_compiled.loops() is None, reason="there is no compiled library")


@pytest.fixture(autouse=True)
def any_processor() -> Iterator[None]:
    yield
    use(2)


def use(processor: int) -> None:
    """The loops for AVX-512 (2), for AVX2 (1), or for any processor."""
    if (library := _compiled.loops()) is not None:
        library.fossil_compare_at_most(processor)


def buffer(name: str, nbytes: int) -> Any:
    return np.empty(nbytes, np.uint8)


def by_numpy(start: int, stored: Any, found: Any, dtype: str, addends: Sequence[Addend]) -> Sums:
    job: Any = SimpleNamespace(part=SimpleNamespace(dtype="F32"), found=SimpleNamespace(dtype=dtype))
    return compare_values(job, start, stored, found, addends, buffer)[0]


def addend(method: str, arrays: dict[str, Any], numbers: dict[str, Any]) -> Addend:
    into = Plain(TensorInfo("w", "F32", (1, 1), Path("w"), 0))
    wide = {role: array.astype(np.float64) for role, array in arrays.items()}
    return Addend(Change(0, Trained("m", method, {}, numbers), into), wide, numbers)


def agree(compiled: Sums | None, numpy: Sums, nearly: bool = False) -> None:
    if compiled is None:
        assert numpy.off
        return
    assert numpy.off == 0
    assert compiled.worst == (
        pytest.approx(numpy.worst, rel=1e-9, abs=2.0**-10 if numpy.worst < 2.0**-10 else 1e-9)
        if nearly
        else numpy.worst
    )
    scale = 1e-5 * numpy.update + 1e-300
    assert compiled.update == (pytest.approx(numpy.update, abs=scale) if nearly else numpy.update)
    assert compiled.kept == (pytest.approx(numpy.kept, abs=scale + 1e-4 * abs(numpy.kept)) if nearly else numpy.kept)
