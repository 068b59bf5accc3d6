"""Bases in bitsandbytes' 4 and 8 bits, against the real library's code for CPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import quantized_bnb as tools
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_bases import linears, merged_equal, plain_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints.quantized import _blocks
from fossil_export.errors import CheckpointError

DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("nf4", "bfloat16", {"blocksize": 64, "compress_statistics": True}),
        ("fp4", "float16", {"blocksize": 128}),
        ("int8", "bfloat16", {}),
    ],
)
def test_a_merge_is_that_of_the_dequantized_base(
    kind: str, dtype: str, options: dict[str, object], tmp_path: Path
) -> None:
    merged_equal(*tools.bnb_folder(tmp_path, kind, dtype, **options), tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_block_size_shape_storage_and_dtype_is_dequantized_bit_for_bit(data: st.DataObject) -> None:
    dtype = getattr(torch, data.draw(st.sampled_from(DTYPES)))
    kind, nested = data.draw(st.sampled_from(["nf4", "fp4"])), data.draw(st.booleans())
    block = data.draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]))
    storage = data.draw(st.sampled_from(["uint8", "bfloat16", "float16", "float32"]))
    unit = {"uint8": 1, "float32": 8}.get(storage, 4)
    shape = (data.draw(st.integers(1, 40)), unit * data.draw(st.integers(1, 200)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    value = (torch.randn(shape) * data.draw(st.sampled_from([1e-6, 0.03, 20]))).to(dtype)
    value[0, : shape[1] // 2] = 0
    options = {"quant_type": kind, "blocksize": block, "compress_statistics": nested}
    tensors, truth = tools.quantized4("a.weight", value, storage, **options)
    first = data.draw(st.integers(0, shape[0] - 1))
    found = tools.decoded(tensors, tools.settings4(kind, nested), first, data.draw(st.integers(first, shape[0])))
    assert found.dtype == truth.dtype and torch.equal(found, truth[first : first + len(found)])


def test_pieces_of_a_large_matrix_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "PIECE", 4096)
    value = torch.randn(40, 800).bfloat16()
    tensors, truth = tools.quantized4("a.weight", value, "uint8", quant_type="nf4", blocksize=64)
    assert torch.equal(tools.decoded(tensors, tools.settings4("nf4", False), 3, 39), truth[3:39])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 90), st.integers(0, 99))
def test_eight_bits_are_dequantized_bit_for_bit(dtype: str, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    value = torch.randn(rows, columns).to(getattr(torch, dtype))
    value[0] = 0
    tensors, truth = tools.quantized8("a.weight", value)
    found = tools.decoded(tensors, tools.SETTINGS8, config={"dtype": dtype})
    assert found.dtype == truth.dtype and torch.equal(found, truth)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([64, 256]), st.integers(0, 99))
def test_a_matrix_is_quantized_to_nf4_and_to_eight_bits_as_the_library_does(
    rows: int, columns: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    old, new = torch.randn(2, rows, columns)
    new[0, :70] = 0
    options = {"quant_type": "nf4", "blocksize": block}
    stored, _ = tools.quantized4("a.weight", old, **options)
    wanted, _ = tools.quantized4("a.weight", new, **options)
    assert tools.equal(tools.encoded(stored, tools.settings4("nf4", False), new), wanted)
    stored, wanted = (tools.quantized8("a.weight", value)[0] for value in (old, new))
    assert tools.equal(tools.encoded(stored, tools.SETTINGS8, new), wanted)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 12345.0])
def test_scales_are_quantized_to_the_nearest_level_about_their_mean(scale: float) -> None:
    torch.manual_seed(0)
    options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
    stored, _ = tools.quantized4("a.weight", torch.randn(64, 520), **options)
    new = torch.randn(64, 520) * scale
    wanted, _ = tools.quantized4("a.weight", new, **options)
    found = tools.encoded(stored, tools.settings4("nf4", True), new)
    state = "a.weight.quant_state.bitsandbytes__nf4"
    offset, theirs = (json.loads(bytes(one[state].numpy()))["nested_offset"] for one in (found, wanted))
    assert np.float32(offset) == pytest.approx(np.float32(theirs), rel=3e-7)
    assert found.pop(state).shape == stored[state].shape
    for name in ("a.weight", "a.weight.quant_map", "a.weight.nested_quant_map"):
        assert torch.equal(found[name], wanted[name])
    codes, levels = found["a.weight.absmax"], found["a.weight.nested_quant_map"]
    plain, _ = bnb.quantize_4bit(new, **(options | {"compress_statistics": False}))[1].absmax, None
    left = plain - np.float32(offset)
    outer = left.split(256)
    assert torch.equal(found["a.weight.nested_absmax"], torch.stack([one.abs().max() for one in outer]))
    for one, own in zip(outer, codes.split(256), strict=True):
        far = (one / one.abs().max() - levels[own.long()]).abs()
        nearest = (one[:, None] / one.abs().max() - levels).abs().min(1).values
        assert torch.allclose(far, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_what_transformers_quantizes_and_saves_is_opened(bits: str, tmp_path: Path) -> None:
    base = plain_model(tmp_path / "plain")
    options: dict[str, Any] = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if bits == "4"
        else {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "up_proj"]}
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "saved")
    truth = model.dequantize(torch.bfloat16).state_dict()
    opened = open_checkpoint(tmp_path / "saved")
    plain = load_file(base / "model.safetensors")
    assert opened.tensors.keys() == plain.keys() and opened.quantized is not None
    assert {name: one.shape for name, one in opened.tensors.items()} == {
        name: (*one.shape,) for name, one in plain.items()
    }
    quantized = {name for name, info in opened.tensors.items() if info.coding is not None}
    assert quantized == {name for name in linears(plain) if bits == "4" or "up_proj" not in name}
    for name in opened.tensors:
        assert torch.equal(tools.read(opened, name), truth[name]), name


@pytest.mark.parametrize("settings", [None, {"load_in_4bit": True}])
def test_older_configs_that_name_no_method_are_known_by_what_they_load(
    settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder, plain = tools.bnb_folder(tmp_path, "nf4")
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    given = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config | given))
    opened, truth = open_checkpoint(folder), load_file(plain / "model.safetensors")
    assert opened.config == config and opened.quantized is not None
    name = linears(truth)[0]
    assert opened.tensors.keys() == truth.keys() and torch.equal(tools.read(opened, name), truth[name])


def test_the_weight_of_a_conv1d_lies_as_its_class_has_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16().save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=options, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "saved")
    opened = open_checkpoint(tmp_path / "saved")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, value in plain.items():
        found = tools.read(opened, name)
        assert found.shape == value.shape, name
        assert torch.allclose(found.float(), value.float(), rtol=0, atol=0.15 * float(value.abs().max())), name
    for name in ("c_attn", "c_proj"):
        weight = model.transformer.h[0].attn.get_submodule(name).weight
        truth = bnb.dequantize_4bit(weight.data, weight.quant_state).T
        assert torch.equal(tools.read(opened, f"transformer.h.0.attn.{name}.weight"), truth)
    matrix = torch.randn(plain["transformer.h.0.attn.c_attn.weight"].shape)
    info = opened.tensors["transformer.h.0.attn.c_attn.weight"]
    written: Any = info.coding
    codes = written.encode(matrix.numpy())["transformer.h.0.attn.c_attn.weight"]
    wanted, _ = bnb.quantize_4bit(matrix.T.contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(torch.from_numpy(codes), wanted)


def _edit(key: str, value: object) -> Callable[[dict[str, torch.Tensor]], None]:
    """Another value in the JSON of a weight."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(one for one in tensors if "quant_state" in one)
        found = json.loads(bytes(tensors[name].numpy())) | {key: value}
        tensors[name] = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)

    return edit


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"a.weight{part}"]

    return edit


def _add(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"a.weight{part}"] = torch.zeros(3, dtype=torch.uint8)

    return edit


def _cut(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"a.weight{part}"] = tensors[f"a.weight{part}"][:-1].clone()

    return edit


STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_edit("quant_type", "nf5"), "a.weight.quant_state.* has quant_type 'nf5'"),
        (_edit("blocksize", 96), "has blocksize 96"),
        (_edit("dtype", "float8"), "has dtype 'float8'"),
        (_edit("shape", [8, -4]), "has shape"),
        (_edit("shape", [9, 80]), r"a.weight \[320, 1\] is U8, and must be a column of 360 bytes"),
        (_edit("nested_offset", None), "has nested_offset None"),
        (_edit("nested_dtype", "bfloat16"), "has nested_dtype 'bfloat16'"),
        (_edit("swizzled", True), "has other keys than bitsandbytes writes .swizzled"),
        (_edit("quant_type", None), "has quant_type None"),
        (_drop(""), "has no a.weight beside it"),
        (_drop(".absmax"), "a.weight has no a.weight.absmax beside it"),
        (_drop(".quant_map"), "a.weight has no a.weight.quant_map beside it"),
        (_drop(".nested_absmax"), "a.weight has no a.weight.nested_absmax beside it"),
        (_drop(STATE), "not quantized|has no a.weight.quant_state"),
        (_cut(".absmax"), r"a.weight.absmax \[9\] is U8, and must be U8 \[10\]"),
        (_cut(STATE), "is not valid JSON"),
        (_add(".quant_state"), r"a.weight.quant_state \[3\] is no part of a weight in 4 bits"),
    ],
)
def test_a_damaged_weight_is_refused_by_name(damage: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    options = {"quant_type": "nf4", "compress_statistics": True}
    tensors, _ = tools.quantized4("a.weight", torch.randn(8, 80), **options)
    damage(tensors)
    with pytest.raises(CheckpointError, match=said):
        tools.decoded(tensors, tools.settings4("nf4", True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bnb_4bit_quant_type": "fp4"},
            "a.weight.quant_state.* is of nf4, but config.json has bnb_4bit_quant_type 'fp4'",
        ),
        (
            {"bnb_4bit_use_double_quant": True},
            "has no quantized scales, but config.json has bnb_4bit_use_double_quant True",
        ),
        ({"load_in_4bit": False, "load_in_8bit": True}, "is of a weight in 4 bits, but config.json has load_in_8bit"),
        ({"load_in_8bit": True}, "has load_in_4bit and load_in_8bit"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(changes: dict[str, Any], said: str) -> None:
    tensors, _ = tools.quantized4("a.weight", torch.randn(8, 80), quant_type="nf4")
    with pytest.raises(CheckpointError, match=said):
        tools.decoded(tensors, tools.settings4("nf4", False) | changes)


@pytest.mark.parametrize("settings", [tools.settings4("nf4", False), tools.SETTINGS8])
def test_a_config_of_quantized_weights_without_any_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"a.weight \[4, 4\] and all|a.weight and all other tensors are not quantized"
    ):
        tools.decoded({"a.weight": torch.randn(4, 4)}, settings)


@pytest.mark.parametrize("name", ["a.weight.absmax", "a.weight.quant_map", "a.weight.nested_absmax"])
def test_values_that_no_quantizer_writes_are_refused(name: str) -> None:
    nested = "nested" in name
    options = {"quant_type": "nf4", "compress_statistics": nested}
    tensors, _ = tools.quantized4("a.weight", torch.randn(8, 80), **options)
    tensors[name][0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{name} holds .*the base is damaged"):
        tools.decoded(tensors, tools.settings4("nf4", nested))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("a.SCB", torch.ones(7), r"a.SCB \[7\] is F32, and must be F32 \[8\]"),
        ("a.SCB", None, "a.weight .* has no a.SCB beside it|not quantized"),
        ("a.SCB", torch.full((8,), float("inf")), "a.SCB holds infinite or NaN values"),
        ("a.weight", None, "a.SCB has no a.weight beside it|a.SCB.* has no a.weight"),
        ("a.weight", torch.ones(8, 80), "a.weight .* is F32, and no matrix of int8"),
        ("a.weight_format", torch.tensor(2, dtype=torch.uint8), "a.weight_format .* is .2.: a.weight is in an order"),
    ],
)
def test_damaged_eight_bits_are_refused_by_name(name: str, value: torch.Tensor | None, said: str) -> None:
    tensors, _ = tools.quantized8("a.weight", torch.randn(8, 80))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(CheckpointError, match=said):
        tools.decoded(tensors, tools.SETTINGS8)
