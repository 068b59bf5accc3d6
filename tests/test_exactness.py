"""The merged weights are PEFT's, bit for bit where the arithmetic allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base, peft_merged, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import MissConfig
from peft.tuners.miss.layer import MissLinear

from fossil_export import load_adapter, merge, plan_merge
from fossil_export.errors import MergeError
from fossil_export.merging._engine import NumpyEngine, TorchEngine, Update, compute_dtype, is_finite, merge_slab
from fossil_export.methods import METHODS

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}

ROLE = {"tile": "D", "mini": "D", "bat": "B"}


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Largest distance in steps of the dtype."""
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    bits = [value.contiguous().view(view).to(torch.int64) for value in (ours, theirs)]
    low = -(1 << (8 * ours.element_size() - 1))
    ordered = [torch.where(value < 0, low - value, value) for value in bits]
    return int((ordered[0] - ordered[1]).abs().max())


def test_real_adapter_of_every_variant_matches_peft(every_real_adapter: Path, tmp_path: Path) -> None:
    found = load_adapter(every_real_adapter)
    result = merge(found, tmp_path / "merged")
    base = Path(found.base_model or "")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, every_real_adapter, torch.bfloat16)
    stored = weights(base)
    assert len(ours) == 272 and result.plan.count("merge") == 210
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        if found.variant == "bat" and name in result.survival:
            # A matrix product: the order of its sums may differ, which shows most where weight and update cancel.
            cancelled = (value - theirs[name]).abs() <= stored[name].abs() * 2.0**-20
            assert ulps(torch.where(cancelled, theirs[name], value), theirs[name]) <= 2, name
        else:
            assert torch.equal(value, theirs[name]), name


def oracle(variant: str, weight: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """PEFT's MissLinear, merged."""
    rank = shard.shape[1] if variant == "bat" else shard.shape[0]
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    config = MissConfig(
        r=rank,
        init_weights={"tile": True, "mini": "mini", "bat": "bat"}[variant],
        mini_r=shard.shape[1] if variant == "mini" else 1,
    )
    peft_layer = MissLinear(layer, "default", config=config, r=rank)
    peft_layer.miss_block["default"].data = shard.clone()
    peft_layer.merge()
    merged: torch.Tensor = peft_layer.get_base_layer().weight.data
    return merged


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, str, tuple[int, int], int, int, int]:
    """variant, dtype, weight shape, rank, mini_r, seed: every shape PEFT accepts."""
    variant = draw(st.sampled_from(["tile", "mini", "bat"]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    rank = draw(st.integers(1, 24))
    if variant == "bat":
        shape = (rank * draw(st.integers(1, 6)), rank * draw(st.integers(1, 6)))
    else:
        shape = (draw(st.integers(1, 90)), draw(st.integers(rank, 700)))
    divisors = [size for size in range(1, shape[0] + 1) if shape[0] % size == 0]
    return variant, dtype, shape, rank, draw(st.sampled_from(divisors)), draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(layers())
def test_any_shape_rank_and_dtype_matches_peft(case: tuple[str, str, tuple[int, int], int, int, int]) -> None:
    variant, dtype, shape, rank, mini_r, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    sizes = {"tile": (rank, shape[0]), "mini": (rank, mini_r), "bat": (shape[0] // rank, rank, rank)}[variant]
    shard = torch.randn(sizes, generator=generator) * 0.1
    theirs = oracle(variant, weight, shard)

    def stored(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return np.asarray(tensor.numpy())

    assert METHODS[variant].mismatch({ROLE[variant]: sizes}, {}, shape) is None
    results = []
    for engine in (NumpyEngine(), TorchEngine("cpu")):
        engine.block = 64  # many blocks even here
        out = np.empty(shape, NUMPY[dtype])
        wide = engine.widen(shard.numpy().reshape(sizes[0], -1), compute_dtype(dtype)).reshape(sizes)
        merge_slab(engine, stored(weight), out, [Update(METHODS[variant], {ROLE[variant]: wide}, {})], 0, shape[0])
        results.append(out)
        ours = torch.from_numpy(out.view(f"i{out.itemsize}").copy()).view(DTYPES[dtype])
        if variant == "bat":
            tolerance = {"F32": 1e-5, "F64": 1e-5, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours, theirs)
    if variant != "bat":
        assert results[0].tobytes() == results[1].tobytes()


@settings(max_examples=60, deadline=None)
@given(layers())
def test_slabs_do_not_show(case: tuple[str, str, tuple[int, int], int, int, int]) -> None:
    """Merging rows in parts gives the bytes of merging them at once, and `update` is what was added."""
    variant, _, shape, rank, mini_r, seed = case
    rng = np.random.default_rng(seed)
    method = METHODS[variant]
    sizes = {"tile": (rank, shape[0]), "mini": (rank, mini_r), "bat": (shape[0] // rank, rank, rank)}[variant]
    shard, weight = rng.standard_normal(sizes, np.float32), rng.standard_normal(shape, np.float32)
    whole, parts = weight.copy(), weight.copy()
    arrays = {ROLE[variant]: shard}
    update = method.update(weight, arrays, {}, 0)
    method.add(whole, arrays, {}, 0)
    step = method.block_rows({ROLE[variant]: sizes}) * 2
    for start in range(0, shape[0], step):
        method.add(parts[start : start + step], arrays, {}, start)
    if variant == "bat":
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(weight + update, whole, rtol=1e-5, atol=1e-5)
    else:
        assert np.array_equal(parts, whole) and np.array_equal(weight + update, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["tile", "mini", "bat"])
def test_whole_models_in_every_dtype(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    options: dict[str, Any] = {"tile": {"r": 7}, "mini": {"r": 7, "init_weights": "mini", "mini_r": 8}}.get(
        variant, {"r": 8, "init_weights": "bat"}
    )
    make_adapter(tmp_path / "adapter", base, **options)
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", dtype)
    for name, value in weights(tmp_path / "merged").items():
        assert value.dtype == dtype
        if variant != "bat":
            assert torch.equal(value, theirs[name]), name
        else:
            assert ulps(value, theirs[name]) <= 2 or torch.allclose(
                value.double(), theirs[name].double(), rtol=0, atol=2.0**-9
            ), name


def test_low_precision_shards_round_once(tmp_path: Path) -> None:
    """bfloat16 shards on a float32 base: exact to the base's dtype, as in PEFT, which loads shards as float32."""
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, change=lambda model: None, autocast=False, init_weights=False)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shards = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(shards, path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    name = "model.layers.1.self_attn.q_proj"
    tiled = shards[f"base_model.model.{name}.miss_block"].float().T.repeat(1, 6)
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"] + tiled)
    assert torch.equal(
        after[f"{name}.weight"], peft_merged(base, tmp_path / "adapter", torch.float32)[f"{name}.weight"]
    )


def test_device_engine_gives_the_same_bytes(real_adapter: Path, tmp_path: Path) -> None:
    """PyTorch's engine, as for a GPU, on the CPU device that every machine has."""
    merge(real_adapter, tmp_path / "numpy")
    merge(real_adapter, tmp_path / "torch", device="cpu:0")
    for file in sorted((tmp_path / "numpy").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "torch" / file.name).read_bytes()


def test_float64_rounds_once_in_both_engines() -> None:
    weight, shard = np.array([[1 + 2.0**-40]]), np.array([[2.0**-11]])
    for kind in (np.float16, ml_dtypes.bfloat16):
        outs = []
        for engine in (NumpyEngine(), TorchEngine("cpu")):
            outs.append(np.empty((1, 1), kind))
            merge_slab(engine, weight, outs[-1], [Update(METHODS["tile"], {"D": engine.widen(shard, "F64")}, {})], 0, 1)
        assert outs[0].tobytes() == outs[1].tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_finite_by_bits_is_finite(dtype: str) -> None:
    values = np.array([0.0, -0.0, 1.5, -2.0, 6e4, -6e4, 1e-30], NUMPY[dtype])
    assert is_finite(values) and is_finite(values[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in range(len(values)):
            damaged = values.copy()
            damaged[place] = bad
            assert not is_finite(damaged)


def test_a_dtype_may_be_torchs_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "one", dtype=torch.bfloat16)
    merge(adapter, tmp_path / "other", dtype="bfloat16")
    assert (tmp_path / "one" / "fossil_export.json").read_bytes() == (
        tmp_path / "other" / "fossil_export.json"
    ).read_bytes()
    assert {value.dtype for value in weights(tmp_path / "one").values()} == {torch.bfloat16}
    with pytest.raises(MergeError, match=r"dtype is 'torch\.int8'"):
        plan_merge(adapter, dtype=torch.int8)


def test_a_rank_as_wide_as_the_weight_is_one_and_a_wider_one_is_not() -> None:
    assert METHODS["tile"].mismatch({"D": (8, 4)}, {}, (4, 8)) is None
    assert "rank 9 exceeds" in (METHODS["tile"].mismatch({"D": (9, 4)}, {}, (4, 8)) or "")
