"""The compiled loops of the weights check say what NumPy says, of any values; and pieces of a weight are all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from verify_tools import flip, tamper

from fossil_export import merge, verify
from fossil_export.adapters import Trained
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._plain import Plain
from fossil_export.merging._change import Change, Part
from fossil_export.verifying import _compiled, _job
from fossil_export.verifying._compiled import Factor, multiplied, rebuilt, tiled
from fossil_export.verifying._job import Job, Sums
from fossil_export.verifying._rebuilding import Addend
from fossil_export.verifying._values import compare_values

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinities, on purpose
needs_compiler = pytest.mark.skipif(_compiled.loops() is None, reason="there is no compiled library")

Q0 = "model.layers.0.self_attn.q_proj.weight"


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


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, strange: bool) -> Any:
    """Weights, or any bits: infinities, NaN, subnormal numbers, both zeros."""
    kind = np.dtype(DTYPES[dtype])
    found = (rng.standard_normal(shape) * 10.0 ** rng.integers(-5, 2)).astype(kind)
    if strange:
        bits = rng.integers(0, 2 ** (8 * kind.itemsize), shape, dtype=np.uint64).astype(f"u{kind.itemsize}")
        some = rng.random(shape) < 0.2
        found[some] = bits.view(kind)[some]
        found[rng.random(shape) < 0.1] = 0.0
    return found


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


def damaged(rng: np.random.Generator, found: Any) -> Any:
    """With one bit of one element turned."""
    bits = found.view(f"u{found.dtype.itemsize}").reshape(-1).copy()
    bits[rng.integers(len(bits))] ^= 1 << int(rng.integers(8 * found.dtype.itemsize))
    return bits.view(found.dtype).reshape(found.shape)


cases = given(
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(list(DTYPES)),
    st.booleans(),
    st.booleans(),
)


@needs_compiler
@settings(max_examples=120, deadline=None)
@cases
def test_tile_and_casts(seed: int, processor: int, before: str, after: str, strange: bool, damage: bool) -> None:
    use(processor)
    rng = np.random.default_rng(seed)
    rows, width, rank = (int(rng.integers(1, most)) for most in (20, 1300, 700))
    start = int(rng.integers(0, 9))
    stored = values(rng, (rows, width), before, strange)
    shard = values(rng, (rank, rows), "F32", strange) * np.float32(rng.choice([0.0, 1e-3, 1.0]))
    with np.errstate(all="ignore"):
        merged = stored.astype(np.float32) + np.take(shard.T, np.arange(width) % rank, axis=1)
        merged, cast = merged.astype(DTYPES[after]), stored.astype(DTYPES[after])
    if damage:
        merged, cast = damaged(rng, merged), damaged(rng, cast)
    change = addend("tile", {"D": shard}, {"r": rank})
    agree(
        tiled(start, stored, merged, np.ascontiguousarray(shard.T), 0),
        by_numpy(start, stored, merged, after, [change]),
    )
    compiled = tiled(start, stored, cast, np.zeros((1, 1), np.float32), 0)
    if compiled is not None or np.isfinite(cast.astype(np.float64)).all():
        agree(compiled, by_numpy(start, stored, cast, after, []))


@needs_compiler
@settings(max_examples=120, deadline=None)
@cases
def test_products_and_blocks(seed: int, processor: int, before: str, after: str, strange: bool, damage: bool) -> None:
    use(processor)
    rng = np.random.default_rng(seed)
    rank, rows, width = (int(rng.integers(1, most)) for most in (20, 20, 900))
    start = int(rng.integers(0, 9))
    stored = values(rng, (rows, width), before, strange)
    first, second = values(rng, (rows, rank), "F32", False), values(rng, (rank, width), "F32", strange)
    size = np.float32(rng.choice([1e-4, 1e-2, 1.0]))
    first, scale = first * size, float(rng.choice([-0.5, 2.0, 1 / 3]))
    change = addend("lora", {"A": second, "B": first}, {"scale": scale, "r": rank})
    with np.errstate(all="ignore"):
        merged = (stored.astype(np.float32) + (first @ second) * np.float32(scale)).astype(DTYPES[after])
    merged = damaged(rng, merged) if damage else merged
    compiled = multiplied(start, stored, merged, first, Factor(second.T), scale, buffer)
    agree(compiled, by_numpy(start, stored, merged, after, [change]), nearly=True)

    width = rank * (1 + width // rank)
    stored, block = values(rng, (rank, width), before, strange), values(rng, (rank, rank), "F32", False) * size
    weight = stored.astype(np.float32)
    with np.errstate(all="ignore"):
        merged = weight + (weight.reshape(-1, rank) @ block).reshape(rank, -1) + np.tile(block, (1, width // rank))
        merged = merged.astype(DTYPES[after])
    merged = damaged(rng, merged) if damage else merged
    change = addend("bat", {"B": block[None]}, {"r": rank})
    compiled = multiplied(start, stored, merged, weight, Factor(block.T), 1.0, buffer, blocks=True)
    agree(compiled, by_numpy(start, stored, merged, after, [change]), nearly=True)


@needs_compiler
@settings(max_examples=60, deadline=None)
@cases
def test_rows_that_were_rebuilt(
    seed: int, processor: int, before: str, after: str, strange: bool, damage: bool
) -> None:
    use(processor)
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 20)), int(rng.integers(1, 1300))
    stored = values(rng, shape, before, strange)
    shard = values(rng, (shape[1], shape[0]), "F32", strange)
    change = addend("tile", {"D": shard}, {"r": shape[1]})
    with np.errstate(all="ignore"):
        exact = stored.astype(np.float64) + shard.T
        merged = exact.astype(np.float32).astype(DTYPES[after])
    merged = damaged(rng, merged) if damage else merged
    agree(rebuilt(3, stored, merged, exact, None), by_numpy(3, stored, merged, after, [change]))


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


@needs_compiler
def test_zeros_are_known_to_be_right_without_a_product_in_float64() -> None:
    nothing, first = np.zeros((2, 600), DTYPES["BF16"]), np.zeros((2, 512), np.float32)
    factor = Factor(np.ones((600, 512), np.float32))
    assert multiplied(0, nothing, nothing, first, factor, 2.0, buffer) == Sums()
    assert factor._wide is None


KINDS: dict[str, dict[str, Any]] = {
    "tile": {"r": 7},
    "mini": {"init_weights": "mini", "mini_r": 8},
    "bat": {"init_weights": "bat"},
    "lora": {"kind": LoraConfig},
}


@pytest.mark.parametrize("name", list(KINDS))
def test_pieces_of_columns_are_the_whole_weight(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows are cut; with the library and without, and the first wrong element is where it is."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, **KINDS[name])
    merge(tmp_path / "adapter", tmp_path / "merged")
    whole = verify(tmp_path / "merged", level="weights")
    assert whole.parity and whole.tensors is not None
    monkeypatch.setattr(_job, "BLOCK", 256)
    monkeypatch.setattr(_job, "TRAINED", 100)
    monkeypatch.setattr(_job, "SLAB", 600)
    cut = verify(tmp_path / "merged", level="weights")
    monkeypatch.setattr("fossil_export.kernels.library", lambda: None)
    monkeypatch.setattr(_compiled, "loops", lambda: None)
    monkeypatch.setattr("fossil_export.verifying._comparison.loops", lambda: None)
    without = verify(tmp_path / "merged", level="weights")
    for found in (cut, without):
        assert found.parity and found.survived == pytest.approx(whole.survived, rel=1e-5)
        worst = [check.worst for check in found.tensors or ()]
        assert worst == pytest.approx([check.worst for check in whole.tensors], rel=1e-9)
    tamper(tmp_path / "merged", Q0, flip)
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    monkeypatch.undo()
    assert verify(tmp_path / "merged", level="weights").problems == (problem,)
    assert problem.startswith(f"{Q0} 1 of ")


def test_pieces_cover_every_element_once() -> None:
    info = TensorInfo("w", "BF16", (40, 5000), Path("w"), 0)
    trained = Trained("m", "bat", {"B": TensorInfo("B", "F32", (10, 4, 4), Path("a"), 0)}, {"r": 4})
    part = Part(0, 40 * 5000, 40, (Change(0, trained, Plain(info)),))
    seen = np.zeros((40, 5000), int)
    small = replace(info, shape=(40, 5000))
    for piece in Job("w", small, small, part, "merge").pieces():
        assert piece.start % 4 == piece.first % 4 == 0
        seen[piece.start : piece.stop, piece.first : piece.last] += 1
        rows = [row for first, last in piece.blocks() for row in range(first, last)]
        assert rows == list(range(piece.start, piece.stop))
    assert (seen == 1).all()
