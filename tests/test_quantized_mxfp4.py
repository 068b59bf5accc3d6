"""Bases in mxfp4 (gpt-oss), against transformers' own dequantization and the live PEFT model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, MissConfig, PeftModel
from quantized_mxfp4 import assert_same_merge, gpt_oss, trained
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._header import slice_of
from fossil_export.checkpoints._input import InputFile, StoredArray
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints.quantized._mxfp4 import VALUES, Mxfp4
from fossil_export.errors import CheckpointError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS: dict[str, Any] = {
    "experts": LoraConfig(r=4, lora_alpha=8, target_parameters=EXPERTS, target_modules=["q_proj", "o_proj"]),
    "attention alone": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "miss": MissConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"]),
}
GATE = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_a_merge_is_that_of_the_dequantized_base(name: str, tmp_path: Path) -> None:
    quantized, dequantized = gpt_oss(tmp_path)
    adapter = trained(dequantized, tmp_path / "adapter", ADAPTERS[name])
    assert_same_merge(adapter, quantized, dequantized, tmp_path)


def test_a_merge_answers_as_the_live_model_does(tmp_path: Path) -> None:
    quantized, dequantized = gpt_oss(tmp_path, "float32")
    adapter = trained(dequantized, tmp_path / "adapter", ADAPTERS["experts"])
    assert_same_merge(adapter, quantized, dequantized, tmp_path)
    tokens = torch.arange(3, 27).reshape(2, 12)
    answers = []
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(dequantized)
        answers.append(plain(tokens).logits)
        answers.append(PeftModel.from_pretrained(plain, adapter)(tokens).logits)
        answers.append(AutoModelForCausalLM.from_pretrained(tmp_path / "of_quantized")(tokens).logits)
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)
    assert torch.allclose(answers[1], answers[2], atol=1e-4)


def coded_folder(folder: Path, codes: torch.Tensor, scales: torch.Tensor, dtype: str = "bfloat16") -> Path:
    tensors = {"x.up_blocks": codes, "x.up_scales": scales}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"torch_dtype": dtype, "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3)),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_any_rows_have_the_bits_of_transformers(
    sizes: tuple[int, int, int], dtype: str, seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every scale that is a number; any slice of the tensor, of whole rows or not."""
    experts, outputs, groups = sizes
    torch.manual_seed(seed)
    codes = torch.randint(0, 256, (experts, outputs, groups, 16)).to(torch.uint8)
    scales = torch.randint(0, 255, (experts, outputs, groups)).to(torch.uint8)
    base = open_checkpoint(coded_folder(tmp_path_factory.mktemp("base"), codes, scales, dtype))
    truth = convert_moe_packed_tensors(codes, scales, dtype=getattr(torch, dtype))
    info = base.tensors["x.up"]
    assert info.shape == tuple(truth.shape)
    count = truth.numel()
    first = data.draw(st.integers(0, count - 1))
    size = data.draw(st.integers(1, count - first))
    found = CodedRows(slice_of(info, first, size, (size,)), partial(view_rows, base.home), 0, size)
    assert bits(found[:]) == bits(truth.flatten()[first : first + size])


def bits(values: Any) -> bytes:
    if isinstance(values, torch.Tensor):
        return values.contiguous().view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(values).tobytes()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-38, 1e-3, 1.0, 1e4]), zeros=st.booleans())
def test_values_are_written_as_the_nearest_codes(seed: int, size: float, zeros: bool, tmp_path_factory: Any) -> None:
    """Within the least power of two that holds them, every code is nearest; codes of codes are the same values."""
    random = np.random.default_rng(seed)
    shape = (2, 3, 2, 32)
    values = torch.from_numpy(random.standard_normal(shape).astype(np.float32) * size).bfloat16().float().numpy()
    if zeros:
        values[0, 1] = 0
    folder = tmp_path_factory.mktemp("base")
    names = coded_folder(folder, torch.zeros(2, 3, 2, 16, dtype=torch.uint8), torch.zeros(2, 3, 2, dtype=torch.uint8))
    coding = open_checkpoint(names).tensors["x.up"].coding
    assert isinstance(coding, Mxfp4)
    matrix = values.reshape(2, 3, 64).swapaxes(1, 2).reshape(128, 3)
    found = coding.encode(matrix)
    codes, scales = found["x.up_blocks"], found["x.up_scales"]
    powers = np.exp2(scales.astype(np.float64) - 127)[..., None]
    largest = np.abs(values).max(-1, keepdims=True).astype(np.float64)
    assert (largest <= 6 * powers).all() and ((largest > 3 * powers) | (scales[..., None] <= 1)).all()
    every = np.array([*VALUES, *(-one for one in VALUES)])
    nearest = np.abs(values[..., None].astype(np.float64) - every * powers[..., None]).min(-1)
    stored = every[np.stack([codes & 15, codes >> 4], -1).reshape(shape)] * powers
    if size > 1e-30:
        assert np.array_equal(np.abs(values - stored), nearest)
        again = coding.encode(stored.astype(np.float32).reshape(2, 3, 64).swapaxes(1, 2).reshape(128, 3))
        second = again["x.up_blocks"]
        restored = every[np.stack([second & 15, second >> 4], -1).reshape(shape)]
        assert np.array_equal(restored * np.exp2(again["x.up_scales"].astype(np.float64) - 127)[..., None], stored)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), width=st.sampled_from([1, 7, 300, 70_000]), data=st.data(), size=st.sampled_from([1, 2])
)
def test_columns_are_read_alike_in_runs_and_row_by_row(
    rows: int, width: int, data: st.DataObject, size: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("base")
    values = np.random.default_rng(1).integers(0, 256, (rows, width * size), np.uint8)
    save_file({"x": torch.from_numpy(values)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    file = InputFile(folder / "model.safetensors", checkpoint.files[0])
    offset = checkpoint.tensors["x"].offset
    assert offset is not None
    dtype = np.dtype(f"u{size}")
    first = data.draw(st.integers(0, width - 1))
    last = data.draw(st.integers(first, width))
    found = StoredArray(file, offset, (rows, width), dtype)[:, first:last]
    assert np.array_equal(found, values.view(dtype)[:, first:last])
    file.close()


def damaged(folder: Path, kind: str) -> str:
    """The message for a base that is damaged in this way."""
    quantized, _ = gpt_oss(folder)
    tensors = load_file(quantized / "model.safetensors")
    if kind == "no scales":
        del tensors[f"{GATE}_scales"]
    elif kind == "no codes":
        del tensors[f"{GATE}_blocks"]
    elif kind == "other scales":
        tensors[f"{GATE}_scales"] = tensors[f"{GATE}_scales"][:, :-1].contiguous()
    elif kind == "codes of another size":
        tensors[f"{GATE}_blocks"] = tensors[f"{GATE}_blocks"].reshape(3, 192, 1, 32)
    elif kind == "signed codes":
        tensors[f"{GATE}_blocks"] = tensors[f"{GATE}_blocks"].to(torch.int8)
    elif kind == "twice":
        tensors[GATE] = torch.zeros(3, 64, 192)
    elif kind == "not to convert":
        edit_json(
            quantized / "config.json",
            quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0"]},
        )
    elif kind == "no list":
        edit_json(
            quantized / "config.json",
            quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": "lm_head"},
        )
    elif kind == "no number":
        tensors[f"{GATE}_scales"][1, 2, 1] = 255
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        base = open_checkpoint(quantized)
        info = base.tensors[GATE]
        CodedRows(replace(info), partial(view_rows, base.home), 0, 3)[:]
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no scales", "gate_up_proj_blocks [3, 192, 2, 16] has no model.layers.0.mlp.experts.gate_up_proj_scales"),
        ("no codes", "gate_up_proj_scales [3, 192, 2] has no model.layers.0.mlp.experts.gate_up_proj_blocks"),
        ("other scales", "gate_up_proj_scales [3, 191, 2] is U8, and must be bytes [3, 192, 2]"),
        ("codes of another size", "gate_up_proj_blocks [3, 192, 1, 32] is U8, not bytes (experts, out, in / 32, 16)"),
        ("signed codes", "gate_up_proj_blocks [3, 192, 2, 16] is I8"),
        ("twice", "has model.layers.0.mlp.experts.gate_up_proj twice"),
        ("not to convert", "modules_to_not_convert in config.json says that it is not"),
        ("no list", "modules_to_not_convert is 'lm_head' in config.json, not a list of names"),
        ("no number", "gate_up_proj_scales holds NaN (the scale 255)"),
    ],
)
def test_what_contradicts_itself_is_refused(kind: str, says: str, tmp_path: Path) -> None:
    assert says in damaged(tmp_path, kind)
