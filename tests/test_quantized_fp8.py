"""Bases in fp8 with scales, against the code of those who own the format."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_bases import fp8_folder, merged_equal
from quantized_scaled import MODULE, checkpoint, encoded, fp8_codes, same, scales, values
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError

WEIGHT, SCALE = f"{MODULE}.weight", f"{MODULE}.weight_scale_inv"
SETTINGS = {"quant_method": "fp8", "weight_block_size": [4, 8]}
OWNER = Fp8Dequantize(FineGrainedFP8Config())


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_a_merge_is_that_of_the_dequantized_base(scale: str, tmp_path: Path) -> None:
    merged_equal(*fp8_folder(tmp_path, scale), tmp_path)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    lead=st.sampled_from([(), (3,)]),
    code=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    scale=st.sampled_from(["float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"]),
    dtype=st.sampled_from(["bfloat16", "float32", "float16"]),
    seed=st.integers(0, 9),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    few_tiny=st.booleans(),
)
def test_blocks_of_any_size_are_what_transformers_makes_of_them(
    blocks: Any, block: Any, lead: Any, code: Any, scale: str, dtype: str, seed: int, where: Any, few_tiny: bool
) -> None:
    codes = fp8_codes(*lead, blocks[0] * block[0], blocks[1] * block[1], seed=seed, dtype=code)
    if few_tiny:  # they are decoded in another way then
        flat = codes.flatten()
        tiny = (flat.view(torch.uint8) & 127 < 8) & (torch.arange(len(flat)) % 61 != 1)
        codes = torch.where(tiny, 1.5, flat.float()).to(code).reshape(codes.shape)
    grid = scales(*lead, *blocks, seed=seed)
    grid = (127 + grid.log2().round()).to(torch.uint8) if scale == "uint8" else grid.to(getattr(torch, scale))
    with tempfile.TemporaryDirectory() as folder:
        opened = checkpoint(
            Path(folder),
            {WEIGHT: codes, SCALE: grid},
            {"quant_method": "fp8", "weight_block_size": list(block)},
            dtype,
        )
        truth = OWNER._dequantize_one(codes, grid, getattr(torch, dtype))
        assert same(values(opened, WEIGHT), truth)
        start, stop = sorted(int(share * len(truth)) for share in where)
        assert same(values(opened, WEIGHT, start, stop), truth[start:stop])
        assert set(opened.tensors) == {WEIGHT} and "quantization_config" not in (opened.config or {})


def weight_dequant(codes: torch.Tensor, grid: torch.Tensor, block: int) -> torch.Tensor:
    """What DeepSeek-V3's kernel computes: each program loads one tile (masked at the ends) and its one scale."""
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    for row in range(0, codes.shape[0], block):
        for column in range(0, codes.shape[1], block):
            tile = codes[row : row + block, column : column + block].float()
            found[row : row + block, column : column + block] = tile * grid[row // block, column // block]
    return found


def test_cut_blocks_are_what_deepseeks_kernel_makes_of_them(tmp_path: Path) -> None:
    """kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows in blocks of 128; columns are cut too here."""
    codes, grid = fp8_codes(576, 300), scales(5, 3)
    opened = checkpoint(tmp_path, {WEIGHT: codes, SCALE: grid}, {"quant_method": "fp8"})
    assert same(values(opened, WEIGHT), weight_dequant(codes, grid, 128))
    with pytest.raises(ValueError, match="not divisible"):
        OWNER._dequantize_one(codes, grid, torch.bfloat16)


@pytest.mark.parametrize("lead,shape", [((), ()), ((), (1,)), ((), (1, 1)), ((3,), (3, 1, 1)), ((3,), ())])
def test_one_scale_for_a_whole_weight(lead: Any, shape: Any, tmp_path: Path) -> None:
    name = WEIGHT if not lead else "model.layers.0.mlp.experts.gate_up_proj"
    codes, grid = fp8_codes(*lead, 12, 10), scales(*shape)
    settings = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    tensors = {name: codes, f"{name}_scale_inv": grid, f"{MODULE}.activation_scale": torch.ones(())}
    opened = checkpoint(tmp_path, tensors, settings)
    truth = OWNER._dequantize_one(codes, grid, torch.bfloat16) if grid.ndim != 1 else (codes.float() * grid).bfloat16()
    assert same(values(opened, name), truth) and set(opened.tensors) == {name}


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "weight_scale"])
def test_scales_under_the_names_of_others(name: str, tmp_path: Path) -> None:
    codes, grid = fp8_codes(8, 16), scales(2, 2)
    passed = {f"{MODULE}.qscale_act": torch.ones(()), "model.layers.0.hc.scale": torch.ones(3)}
    opened = checkpoint(tmp_path, {WEIGHT: codes, f"{MODULE}.{name}": grid, **passed}, SETTINGS)
    assert same(values(opened, WEIGHT), OWNER._dequantize_one(codes, grid, torch.bfloat16))
    assert set(opened.tensors) == {WEIGHT, "model.layers.0.hc.scale"}


@pytest.mark.parametrize("scale", ["float8_e8m0fnu", "uint8"])
def test_experts_of_4_bits_beside_weights_of_8(scale: str, tmp_path: Path) -> None:
    """As DeepSeek-V4 is published."""
    codes, grid = fp8_codes(8, 16), scales(2, 2)
    packed = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(4, 64)
    powers = torch.arange(100, 116, dtype=torch.uint8).reshape(4, 4)
    powers = powers if scale == "uint8" else powers.view(torch.float8_e8m0fnu)
    expert = "layers.0.ffn.experts.0.w1"
    tensors = {WEIGHT: codes, f"{MODULE}.scale": grid, f"{expert}.weight": packed, f"{expert}.scale": powers}
    opened = checkpoint(tmp_path, tensors, SETTINGS | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"})
    assert same(values(opened, WEIGHT), OWNER._dequantize_one(codes, grid, torch.bfloat16))
    assert same(values(opened, f"{expert}.weight"), OWNER._dequantize_one(packed, powers, torch.bfloat16))
    assert opened.tensors[f"{expert}.weight"].shape == (4, 128)


@pytest.mark.parametrize(
    "shape,grid",
    [((6, 10), (6, 1)), ((3, 6, 10), (3, 1, 10)), ((3, 6, 10), (3, 10, 1))],
)
def test_fbgemm_has_a_scale_for_each_output(shape: Any, grid: Any, tmp_path: Path) -> None:
    """Of experts (n, in, out) that are columns, in either of the two shapes that `FbgemmFp8Quantize` writes."""
    name = WEIGHT if len(shape) == 2 else "model.layers.0.feed_forward.experts.gate_up_proj"
    codes, own = fp8_codes(*shape), scales(*grid)
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    opened = checkpoint(tmp_path, {name: codes, f"{name}_scale": own}, settings)
    wide = own if len(shape) == 2 else own.reshape(shape[0], 1, shape[2])
    assert same(values(opened, name), (codes.float() * wide).bfloat16())


@pytest.mark.parametrize("tiny", [True, False])
def test_scales_beyond_the_fast_way_are_right_too(tiny: bool, tmp_path: Path) -> None:
    codes = fp8_codes(8, 16) if tiny else (2 + torch.arange(128).reshape(8, 16) * 3).to(torch.float8_e4m3fn)
    grid = torch.tensor([[1e6, 2.0**-140], [128.0, 127.99]])
    opened = checkpoint(tmp_path, {WEIGHT: codes, SCALE: grid}, SETTINGS, "float32")
    assert same(values(opened, WEIGHT), OWNER._dequantize_one(codes, grid, torch.float32))


def test_fbgemm_is_what_the_layer_multiplies_by(tmp_path: Path) -> None:
    """As `FbgemmFp8Linear.forward` calls PyTorch, for inputs of which one is 1 and all others 0."""
    codes, own = fp8_codes(32, 64), scales(32, 1)
    opened = checkpoint(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": own}, {"quant_method": "fbgemm_fp8"})
    inputs, ones = torch.eye(64).to(torch.float8_e4m3fn), torch.ones(64, 1)
    truth = torch._scaled_mm(inputs, codes.t(), scale_a=ones, scale_b=own.t(), out_dtype=torch.bfloat16).t()
    assert torch.equal(values(opened, WEIGHT), truth)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_codes_that_are_no_numbers_are_refused(code: int, scale: float, tmp_path: Path) -> None:
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[5, 3] = code
    tensors = {WEIGHT: codes.view(torch.float8_e4m3fn), SCALE: torch.full((2, 2), scale)}
    with pytest.raises(CheckpointError, match=f"{WEIGHT} holds infinite or NaN"):
        values(checkpoint(tmp_path, tensors, SETTINGS), WEIGHT)


CODES, GRID = fp8_codes(8, 16), scales(2, 2)
WRONG = {
    "no scale": ({WEIGHT: CODES}, SETTINGS, f"{WEIGHT} .* has no {SCALE} beside it"),
    "a scale of another shape": ({WEIGHT: CODES, SCALE: scales(2, 3)}, SETTINGS, rf"{SCALE} .* must be \[2, 2\]"),
    "one scale, but blocks": ({WEIGHT: CODES, SCALE: scales(1)}, SETTINGS, r"must be \[2, 2\] for blocks of 4 × 8"),
    "blocks, but one scale": (
        {WEIGHT: CODES, SCALE: GRID},
        SETTINGS | {"weight_block_size": None},
        "must be one number",
    ),
    "a scale of whole numbers": ({WEIGHT: CODES, SCALE: GRID.int()}, SETTINGS, f"{SCALE} .* is stored as I32"),
    "an infinite scale": ({WEIGHT: CODES, SCALE: GRID / 0}, SETTINGS, f"{SCALE} holds infinite or NaN"),
    "a scale without codes": ({WEIGHT: CODES.bfloat16(), SCALE: GRID}, SETTINGS, f"{SCALE} .* is the scale of a"),
    "a weight that the config leaves out": (
        {WEIGHT: CODES, SCALE: GRID},
        SETTINGS | {"modules_to_not_convert": ["model.layers.0"]},
        f"{WEIGHT} .* is quantized, but the config says that it is not .modules_to_not_convert",
    ),
    "one that a pattern leaves out": (
        {WEIGHT: CODES, SCALE: GRID},
        SETTINGS | {"ignored_layers": ["model.*up_proj"]},
        "but the config says that it is not .ignored_layers",
    ),
    "a field that is not known": (
        {WEIGHT: CODES, SCALE: GRID},
        SETTINGS | {"rotated": True},
        "has the field 'rotated', which is not known",
    ),
    "blocks that are none": ({WEIGHT: CODES, SCALE: GRID}, SETTINGS | {"weight_block_size": [4]}, "is .4. in config"),
    "4 bits with scales of 8": (
        {WEIGHT: torch.zeros(8, 16, dtype=torch.int8), SCALE: GRID},
        SETTINGS,
        r"must be \[8, 1\], one scale for each 32 weights of 4 bits",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    tensors, settings, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        values(checkpoint(tmp_path, tensors, settings), WEIGHT)


def test_a_list_of_modules_leaves_out_what_transformers_leaves_out(tmp_path: Path) -> None:
    """ "layer.1" is not "layer.11"."""
    tensors = {"model.layers.11.up.weight": CODES, "model.layers.11.up.weight_scale_inv": GRID}
    settings = SETTINGS | {"modules_to_not_convert": ["model.layers.1", "lm_head", "model.*gate", "model.*u"]}
    opened = checkpoint(tmp_path, tensors, settings)
    assert same(values(opened, "model.layers.11.up.weight"), OWNER._dequantize_one(CODES, GRID, torch.bfloat16))


@pytest.mark.parametrize("name", ["model", "model.layers.11", "model.layers.11.up"])
def test_a_weight_in_a_module_that_is_said_to_be_left_out_is_refused(name: str, tmp_path: Path) -> None:
    tensors = {"model.layers.11.up.weight": CODES, "model.layers.11.up.weight_scale_inv": GRID}
    with pytest.raises(CheckpointError, match="the config says that it is not"):
        checkpoint(tmp_path, tensors, SETTINGS | {"modules_to_not_convert": [name]})


def test_without_a_config_scales_tell_what_is_quantized(tmp_path: Path) -> None:
    checkpoint(tmp_path, {WEIGHT: fp8_codes(256, 130), SCALE: scales(2, 2)}, None)
    (tmp_path / "config.json").unlink()
    opened = open_checkpoint(tmp_path)
    assert opened.config is None and set(opened.tensors) == {WEIGHT}
    rows = read_rows(opened.tensors[WEIGHT], 0, 256, partial(view_rows, opened.home))
    assert all((rows[at : at + 60] == rows[:][at : at + 60]).all() for at in (0, 100, 196))


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    lead=st.sampled_from([(), (3,)]),
    powers=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_are_quantized_as_transformers_quantizes_them(
    blocks: Any, block: Any, lead: Any, powers: bool, seed: int
) -> None:
    shape = (*lead, blocks[0] * block[0], blocks[1] * block[1])
    given_values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scales(*shape, seed=seed)
    given_values[..., : block[0], : block[1]] = 0  # a block without a largest value
    fmt = "ue8m0" if powers else "float"
    owner = Fp8Quantize(
        SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block, scale_fmt=fmt))
    )
    truth = owner._quantize_one(WEIGHT, given_values)
    with tempfile.TemporaryDirectory() as folder:
        method = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": fmt}
        opened = checkpoint(Path(folder), truth, method)
        found = encoded(opened, WEIGHT, given_values)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in truth.items())


def test_cut_blocks_are_quantized_as_if_zeros_followed(tmp_path: Path) -> None:
    given_values = torch.randn(7, 11)
    padded = torch.zeros(8, 16)
    padded[:7, :11] = given_values
    owner = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(4, 8))))
    truth = owner._quantize_one(WEIGHT, padded)
    opened = checkpoint(tmp_path, {WEIGHT: truth[WEIGHT][:7, :11], SCALE: truth[SCALE]}, SETTINGS)
    found = encoded(opened, WEIGHT, given_values)
    assert torch.equal(found[SCALE], truth[SCALE])
    assert torch.equal(found[WEIGHT].view(torch.uint8), truth[WEIGHT][:7, :11].contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", ["fbgemm_fp8", "fp4", "bfloat16 scales", "one scale"])
def test_quantizing_again_gives_back_what_is_quantized(kind: str, tmp_path: Path) -> None:
    """Values that are codes of a grid whose scales are used up: nothing is lost by writing them anew."""
    codes, method, name = fp8_codes(8, 64), SETTINGS, SCALE
    codes[:, ::8] = 448.0
    own = scales(2, 8).log2().round().exp2()
    if kind == "fbgemm_fp8":
        method, own, name = {"quant_method": kind}, scales(8, 1).log2().round().exp2(), f"{WEIGHT}_scale"
    elif kind == "fp4":
        codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(8, 32)
        codes[:, ::16] = 0x77
        own = torch.arange(100, 116, dtype=torch.uint8).reshape(8, 2).view(torch.float8_e8m0fnu)
    elif kind == "bfloat16 scales":
        own = own.bfloat16()
    elif kind == "one scale":
        method, own = SETTINGS | {"weight_block_size": None}, torch.tensor(0.25)
    opened = checkpoint(tmp_path, {WEIGHT: codes, name: own}, method, "float32")
    before = values(opened, WEIGHT)
    found = encoded(opened, WEIGHT, before)
    assert found[name].dtype == own.dtype and found[WEIGHT].dtype == codes.dtype
    again = checkpoint(tmp_path / "again", found, method, "float32")
    assert torch.equal(values(again, WEIGHT), before)


def test_powers_of_two_that_are_stored_as_floats_stay_powers_of_two(tmp_path: Path) -> None:
    """As DeepSeek-V3.1 is published."""
    opened = checkpoint(tmp_path, {WEIGHT: CODES, SCALE: GRID}, SETTINGS | {"scale_fmt": "ue8m0"})
    given_values = torch.randn(8, 16)
    owner = FineGrainedFP8Config(weight_block_size=(4, 8), scale_fmt="ue8m0")
    truth = Fp8Quantize(SimpleNamespace(quantization_config=owner))._quantize_one(WEIGHT, given_values)
    found = encoded(opened, WEIGHT, given_values)
    assert torch.equal(found[SCALE], truth[SCALE].float())
    assert torch.equal(found[WEIGHT].view(torch.uint8), truth[WEIGHT].view(torch.uint8))


def test_every_power_of_two(tmp_path: Path) -> None:
    codes, grid = fp8_codes(5, 51), torch.arange(255, dtype=torch.uint8).reshape(5, 51)
    opened = checkpoint(tmp_path, {WEIGHT: codes, SCALE: grid}, SETTINGS | {"weight_block_size": [1, 1]}, "float32")
    assert same(values(opened, WEIGHT), OWNER._dequantize_one(codes, grid, torch.float32))


@pytest.mark.parametrize(
    "config, dtype",
    [
        ({}, torch.bfloat16),
        ({"text_config": {"dtype": "float16"}, "vision_config": {}}, torch.float16),
        ({"torch_dtype": "float32", "text_config": {"torch_dtype": "float16"}}, torch.float32),
    ],
)
def test_the_dtype_may_stand_in_a_part_of_the_config_or_nowhere(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    opened = checkpoint(tmp_path, {WEIGHT: CODES, SCALE: GRID}, SETTINGS, None, **config)
    assert same(values(opened, WEIGHT), OWNER._dequantize_one(CODES, GRID, dtype))


@pytest.mark.parametrize(
    "key", [3, slice(1, 7, 3), slice(None, None, -1), slice(-2, None), slice(5, 2), [6, 0, 6], (slice(2, 4), slice(3))]
)
def test_rows_are_had_as_those_of_an_array(key: Any, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {WEIGHT: CODES, SCALE: GRID}, SETTINGS, "float32")
    rows = read_rows(opened.tensors[WEIGHT], 0, 8, partial(view_rows, opened.home))
    truth = OWNER._dequantize_one(CODES, GRID, torch.float32).numpy()[key]
    assert np.array_equal(rows[key], truth)


def test_only_scales_of_activations_and_caches_are_passed_over(tmp_path: Path) -> None:
    passed = {f"{MODULE}.{name}": torch.ones(()) for name in ("input_scale", "activation_scale", "k_scale")}
    kept = {"model.block_scale": torch.ones(3), "model.stack_scale": torch.ones(3)}
    opened = checkpoint(tmp_path, {WEIGHT: CODES, SCALE: GRID} | passed | kept, SETTINGS, expert_dtype="fp4")
    assert set(opened.tensors) == {WEIGHT, *kept} and "expert_dtype" not in (opened.config or {})


def test_ordinary_codes_are_decoded_by_moving_their_bits(tmp_path: Path) -> None:
    """The fast way is taken for weights as they are, and right for all codes."""
    codes = (torch.randn(64, 122, generator=torch.Generator().manual_seed(4)) * 100).clamp(-448, 448)
    codes = codes.to(torch.float8_e4m3fn)
    codes.view(torch.uint8).view(-1)[1:257] = torch.arange(256, dtype=torch.uint8)
    codes.view(torch.uint8)[codes.isnan()] = 0
    grid = scales(16, 16)
    opened = checkpoint(tmp_path, {WEIGHT: codes, SCALE: grid}, SETTINGS, "float32")
    coding: Any = opened.tensors[WEIGHT].coding
    assert coding._widener(codes.view(torch.uint8).numpy(), 1.0)[1] != 1.0
    wide = grid.repeat_interleave(4, 0).repeat_interleave(8, 1)[:, :122]
    assert same(values(opened, WEIGHT), codes.float() * wide)
