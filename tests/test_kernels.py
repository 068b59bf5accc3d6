"""The compiled loops give NumPy's bits, at every level of processors, and nothing misses them but time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import make_adapter, make_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fossil_export import kernels
from fossil_export.checkpoints._rounding import widened
from fossil_export.kernels._rows import measure_rows, merge_rows
from fossil_export.merging._engine import NumpyEngine, Update, cast, is_finite, merge_slab
from fossil_export.merging._survival import Survival, measure
from fossil_export.methods import METHODS
from fossil_export.methods._tile import tiled

Array = np.ndarray[Any, Any]

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
EDGES = [
    0.0,
    -0.0,
    1.0,
    65504.0,
    65519.996,
    65520.0,
    3.3895314e38,
    3.3961776e38,
    3.4028235e38,
    2.0**-14,
    2.0**-24,
    1e-45,
]
MULTIPLE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def levels() -> list[int]:
    library = kernels.library()
    if library is None:
        return []
    best, found = library.fossil_level(-1), []
    for level in range(3):
        if library.fossil_level(level) == level:
            found.append(level)
    library.fossil_level(best)
    return found


LEVELS = levels()


@pytest.fixture(params=LEVELS or [pytest.param(0, marks=pytest.mark.skip(reason="no compiler was there"))])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    library = kernels.library()
    best = library.fossil_level(-1)
    assert library.fossil_level(request.param) == request.param
    yield request.param
    assert library.fossil_level(best) == best


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FOSSIL_EXPORT_KERNELS", "0")
    kernels.library.cache_clear()
    yield
    monkeypatch.undo()
    kernels.library.cache_clear()


def test_the_library_is_there_if_a_compiler_is() -> None:
    assert kernels.library() is not None or shutil.which("cc") is None


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Array, Array | None]:
    """Rows that may lie at odd addresses and any way round, memory for the result, and an update."""
    source, target = draw(st.sampled_from(sorted(NUMPY))), draw(st.sampled_from(sorted(NUMPY)))
    count, width = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 7, 8, 31, 64, 65, 513, 1100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    drawn = rng.standard_normal((count, width), np.float32) * np.float32(
        10.0 ** draw(st.sampled_from([-40, -7, -3, 0, 4]))
    )
    edges = rng.random((count, width)) < 0.2
    more = [*EDGES, *([np.inf, np.nan] if draw(st.booleans()) else [])]
    drawn[edges] = rng.choice(np.array(more, np.float32), edges.sum()) * rng.choice(np.float32([1, -1]), edges.sum())
    with np.errstate(over="ignore"):
        values = drawn.astype(NUMPY[source])
    rows = placed(values, draw(st.integers(0, 3)))
    if draw(st.booleans()):
        rows = np.asfortranarray(rows)
    out = placed(np.zeros((count, width), NUMPY[target]), draw(st.integers(0, 3)))
    kind = draw(st.sampled_from(["none", "whole", "narrow", "transposed"]))
    if kind == "none":
        return rows, out, None
    rank = width if kind == "whole" else draw(st.sampled_from([1, 2, 3, 8, 64, 511, 512, 600, 1500]))
    scale = np.float32(draw(st.sampled_from([1e-3, 1.0, 3e38])))
    update = rng.uniform(-1, 1, (count, rank)).astype(np.float32) * scale
    return rows, out, np.asfortranarray(update) if kind == "transposed" else update


def placed(values: Array, shift: int) -> Array:
    """The same in memory that begins `shift` bytes later than it should."""
    raw = np.zeros(values.nbytes + 8, np.uint8)[shift : shift + values.nbytes]
    raw[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return raw.view(values.dtype).reshape(values.shape)


@MULTIPLE
@given(cases())
def test_rows_are_merged_and_cast_as_by_numpy(level: int, case: tuple[Array, Array, Array | None]) -> None:
    rows, out, update = case
    with np.errstate(over="ignore", invalid="ignore"):
        wide = rows.astype(np.float32)
        if update is not None:
            wide = wide + tiled(update, rows.shape[1])
        wanted = wide.astype(out.dtype)
    finite = merge_rows(rows, out, update)
    assert finite is is_finite(np.ascontiguousarray(wanted))
    if finite:
        assert out.tobytes() == wanted.tobytes()
    if update is None:
        assert cast(rows, out) is finite
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = rows.astype(out.dtype)
        assert out.tobytes() == wanted.tobytes()  # what is NaN too


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_number_and_every_middle_of_two_is_rounded_right(level: int, dtype: str) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[dtype]).reshape(1, -1)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))].reshape(1, -1)
    wide = np.empty(numbers.shape, np.float32)
    assert merge_rows(numbers, wide) and wide.tobytes() == numbers.astype(np.float32).tobytes()
    ordered = np.sort(wide)
    middles = ordered[:, 1:] / 2 + ordered[:, :-1] / 2
    for towards in (None, np.inf, -np.inf):
        values = middles if towards is None else np.nextafter(middles, np.float32(towards))
        found = np.empty(values.shape, numbers.dtype)
        assert merge_rows(values, found) and found.tobytes() == values.astype(numbers.dtype).tobytes()


@MULTIPLE
@given(
    st.integers(1, 8),
    st.sampled_from([1, 5, 8, 9, 127, 128, 136, 1000]),
    st.sampled_from(sorted(NUMPY)),
    st.integers(0, 9),
)
def test_what_is_left_of_an_update_is_measured_to_the_bit(
    level: int, rows: int, width: int, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before, update = (rng.standard_normal((rows, width), np.float32) * scale for scale in (1, np.float32(1e-2)))
    after = (before + update).astype(NUMPY[dtype])
    moved, wanted = after.astype(np.float64) - before, update.astype(np.float64)
    sums = [float(product.sum()) for product in (moved * wanted, wanted * wanted, moved * moved)]
    assert measure_rows(before, update, after) == tuple(sums)
    assert measure(before, update, after) == Survival(*sums)


def test_every_float16_is_widened_by_the_table() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert widened(every).tobytes() == every.astype(np.float32).tobytes()


@pytest.mark.parametrize("method", ["tile", "mini", "bat", "lora"])
@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_slabs_and_their_survival_are_those_of_numpy(
    method: str, dtype: str, weight: float, request: pytest.FixtureRequest
) -> None:
    rng = np.random.default_rng(5)
    shapes = {
        "tile": {"D": (8, 96)},
        "mini": {"D": (8, 12)},
        "bat": {"B": (12, 8, 8)},
        "lora": {"A": (4, 200), "B": (96, 4)},
    }
    numbers: dict[str, Any] = {"scale": 1.5} if method == "lora" else {}
    arrays = {role: rng.standard_normal(shape, np.float32) * np.float32(0.01) for role, shape in shapes[method].items()}
    stored = rng.standard_normal((96, 200), np.float32).astype(NUMPY[dtype])
    one = Update(METHODS[method], arrays, numbers, weight)
    found = []
    for updates in ([one], [one, one]):
        for block in (1 << 19, 1 << 10):
            engine = NumpyEngine()
            engine.block = block
            out = np.empty_like(stored)
            sums, finite = merge_slab(engine, stored, out, updates, 0, 96)
            assert finite
            found.append((out.tobytes(), sums))
    request.getfixturevalue("without")
    assert kernels.library() is None
    for updates in ([one], [one, one]):
        for block in (1 << 19, 1 << 10):
            engine = NumpyEngine()
            engine.block = block
            out = np.empty_like(stored)
            sums, finite = merge_slab(engine, stored, out, updates, 0, 96)
            assert finite and found.pop(0) == (out.tobytes(), sums)


def test_a_folder_is_the_same_without_the_library(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, r=7)
    outputs = []
    for value in ("1", "0"):
        target = tmp_path / value
        command = [sys.executable, "-m", "fossil_export", "merge", str(tmp_path / "adapter"), "--output", str(target)]
        command += ["--dtype", "float16"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "FOSSIL_EXPORT_KERNELS": value}
        )
        assert done.returncode == 0, done.stderr
        outputs.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert outputs[0] == outputs[1]


def test_a_library_of_another_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no compiler")
    source, target = tmp_path / "other.c", tmp_path / f"_library{kernels.EXTENSION_SUFFIXES[0]}"
    source.write_text("int fossil_level(int wanted) { return wanted; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    assert kernels.library.__wrapped__() is None


def test_a_library_for_another_machine_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"_library{kernels.EXTENSION_SUFFIXES[0]}").write_bytes(b"made for another machine")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    assert kernels.library.__wrapped__() is None
