"""The compiled loops of the weights check say what NumPy says, of any values; and pieces of a weight are all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import compared_tools
import numpy as np
import pytest
import torch
from compared_tools import DTYPES, addend, agree, buffer, by_numpy, needs_compiler, use
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

any_processor = compared_tools.any_processor
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinities, on purpose

Q0 = "model.layers.0.self_attn.q_proj.weight"


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
