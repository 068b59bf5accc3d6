"""Bases with MLX's affine codes, against MLX itself where it is installed, and against transformers' code for Metal."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from quantized_bases import plain_model
from quantized_mxfp4 import assert_same_merge, stored_as, trained
from safetensors.torch import load_file, save_file
from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError

DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def packed(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Codes (rows, n) as a stream of bits in words of 32, as MLX packs them."""
    every = (codes[..., None] >> np.arange(bits)) & 1
    found = np.packbits(every.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(found).view(np.uint32))


def rounded(codes: np.ndarray[Any, Any], scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """What MLX computes: each step in the dtype of the scales."""
    groups = torch.from_numpy(codes).float().reshape(len(codes), scales.shape[1], -1)
    found = (groups * scales.float()[..., None]).to(scales.dtype) + biases[..., None]
    return found.reshape(codes.shape)


def weight(rows: int, groups: int, group: int, bits: int, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a random weight, and what they stand for."""
    codes = np.random.default_rng(rows + bits).integers(0, 1 << bits, (rows, groups * group))
    scales, biases = (torch.randn(rows, groups).to(dtype) for _ in range(2))
    return {"weight": packed(codes, bits), "scales": scales, "biases": biases}, rounded(codes, scales, biases)


def folders(work: Path, module_bits: dict[str, int], dtype: str = "bfloat16") -> tuple[Path, Path]:
    """(quantized, dequantized) folders of a random Llama, 4 bits but for some modules."""
    base = plain_model(work / "dequantized", dtype)
    plain = load_file(base / "model.safetensors")
    stored = dict(plain)
    for name, value in plain.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            continue
        group = 32 if module in module_bits else 64
        tensors, truth = weight(
            len(value), value.shape[1] // group, group, module_bits.get(module, 4), getattr(torch, dtype)
        )
        plain[name] = truth
        stored |= {f"{module}.{own}": part for own, part in tensors.items()}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    said: Any = {"group_size": 64, "bits": 4} | {
        module: {"group_size": 32, "bits": bits} for module, bits in module_bits.items()
    }
    quantized = stored_as(work / "quantized", base, stored, said)
    edit_json(quantized / "config.json", quantization=said)
    return quantized, base


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_is_that_of_the_dequantized_base(dtype: str, tmp_path: Path) -> None:
    quantized, dequantized = folders(tmp_path, {DOWN: 6}, dtype)
    adapter = trained(dequantized, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert_same_merge(adapter, quantized, dequantized, tmp_path)


def read(tensors: Tensors, folder: Path, **said: Any) -> torch.Tensor:
    save_file({f"x.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization": said} if "method" not in said else _method(said)))
    base = open_checkpoint(folder)
    info = base.tensors["x.weight"]
    half = info.shape[0] // 2
    values = [
        CodedRows(info, partial(view_rows, base.home), start, stop)[:]
        for start, stop in ((0, half), (half, info.shape[0]))
    ]
    return torch.from_numpy(np.concatenate(values).astype(np.float32)).to(tensors["scales"].dtype)


def _method(said: dict[str, Any]) -> dict[str, Any]:
    return {"quantization_config": {name: value for name, value in said.items() if name != "method"} | {
        "quant_method": said["method"]
    }}  # fmt: skip


def assert_written(values: torch.Tensor, tensors: Tensors, folder: Path) -> None:
    """The values that were quantized are written as these tensors, bit by bit."""
    coding: Any = open_checkpoint(folder).tensors["x.weight"].coding
    found = coding.encode(values.numpy())
    assert found.keys() == {f"x.{name}" for name in tensors}
    for name, value in tensors.items():
        assert found[f"x.{name}"].tobytes() == value.contiguous().view(torch.uint8).numpy().tobytes(), name


SHAPES = {
    "rows": st.integers(1, 20),
    "groups": st.integers(1, 5),
    "group": st.sampled_from([32, 64, 128]),
    "bits": st.sampled_from([2, 3, 4, 5, 6, 8]),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
}


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_any_weight_is_its_formula(
    rows: int, groups: int, group: int, bits: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors, truth = weight(rows, groups, group, bits, dtype)
    found = read(tensors, tmp_path_factory.mktemp("base"), bits=bits, group_size=group)
    assert torch.equal(found, truth)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_any_weight_has_the_bits_of_mlx(
    rows: int, groups: int, group: int, bits: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mx = pytest.importorskip("mlx.core")
    values = torch.randn(rows, groups * group) * torch.logspace(-4, 2, groups * group)
    values[0] = 0
    of_mlx = mx.quantize(
        mx.array(values.numpy()).astype(getattr(mx, str(dtype).removeprefix("torch."))), group_size=group, bits=bits
    )
    truth = mx.dequantize(*of_mlx, group_size=group, bits=bits).astype(mx.float32)
    tensors = {
        "weight": torch.from_numpy(np.array(of_mlx[0])),
        "scales": torch.from_numpy(np.array(of_mlx[1].astype(mx.float32))).to(dtype),
        "biases": torch.from_numpy(np.array(of_mlx[2].astype(mx.float32))).to(dtype),
    }
    folder = tmp_path_factory.mktemp("base")
    found = read(tensors, folder, bits=bits, group_size=group)
    assert torch.equal(found.float(), torch.from_numpy(np.array(truth)))
    assert_written(values, tensors, folder)


EDGES = [
    *([0] * 32, [1e-9] * 32, [0.5] * 32, [*range(-15, 1)] * 2, [*range(-1, 15)] * 2, [-1, 1.25] * 16),
    [-7.5, 7.5, 0, 1] * 8,
]
"""Groups without a width, below zero, mostly above it, whose scale is not their width's, and as far to both sides."""


def test_groups_at_the_edges_are_written_as_mlx_0_32_writes_them(tmp_path: Path) -> None:
    tiny = -float(np.float32(1e-7))
    codes = [*[[0] * 32] * 3, [*range(16)] * 2, [*range(15, -1, -1)] * 2, [14, 0] * 16, [15, 0, 8, 7] * 8]
    tensors = {
        "weight": packed(np.array(codes), 4),
        "scales": torch.tensor([[tiny], [tiny], [tiny], [1], [-1], [-0.15625], [-0.9375]]),
        "biases": torch.tensor([[0], [0], [0.5], [-15], [14], [1.25], [7.5]]),
    }
    read(tensors, tmp_path, bits=4, group_size=32)
    assert_written(torch.tensor(EDGES), tensors, tmp_path)


@settings(max_examples=20, deadline=None)
@given(**{**SHAPES, "bits": st.sampled_from([2, 4, 8])})
def test_weights_for_metal_have_the_bits_of_transformers(
    rows: int, groups: int, group: int, bits: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = torch.randn(rows, groups * group).to(dtype)
    values[0] = 0
    codes, scales, biases = _affine_quantize_tensor(values, group, bits)
    truth = _affine_dequantize_tensor(codes, scales, biases, group, bits).to(scales.dtype)
    tensors = {"weight": codes.view(torch.uint32), "scales": scales, "qbiases": biases}
    folder = tmp_path_factory.mktemp("base")
    found = read(tensors, folder, bits=bits, group_size=group, method="metal")
    assert torch.equal(found, truth)
    assert_written(values.float(), tensors, folder)


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    tensors, _ = weight(8, 2, 32, 4, torch.float16)
    good: dict[str, Any] = {"bits": 4, "group_size": 32}

    def says(text: str, changed: dict[str, Any] | None = None, **said: Any) -> None:
        found = {name: value for name, value in {**tensors, **(changed or {})}.items() if value is not None}
        with pytest.raises(CheckpointError) as caught:
            read(found, tmp_path, **good | said)
        assert text in str(caught.value) and "\n" not in str(caught.value), caught.value

    says("x.weight [8, 8] has no x.scales beside it", {"scales": None})
    says("x.weight [8, 8] has no x.biases beside it", {"biases": None})
    says("x.scales [8, 2] has no x.weight beside it", {"weight": None})
    says("x.scales [8, 1] is F16, and must be F16 [8, 2]", {"scales": torch.ones(8, 1).half()})
    says("x.biases [8, 2] is F32, and must be F16 [8, 2]", {"biases": torch.ones(8, 2)})
    says("x.weight [8, 8] is stored as I32", {"weight": torch.zeros(8, 8, dtype=torch.int32)})
    says("x.biases holds infinite or NaN values", {"biases": torch.full((8, 2), torch.inf).half()})
    says("x.scales [8, 2] is F16, and must be F16 [8, 1]", bits=8)
    says("is no whole number of groups of 48 codes of 4 bits", group_size=48)
    says("has 7 bits in groups of 32, by config.json", bits=7)
    says("has 4 bits in groups of '32', by config.json", group_size="32")
    says("is quantized with MLX's mode 'mxfp4', which is not read here; load it with mlx-lm", mode="mxfp4")
    says("is quantized with MLX's mode 'new', which is not known", mode="new")
    (tmp_path / "config.json").unlink()
    save_file({f"x.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not there to say how its weights are quantized"):
        open_checkpoint(tmp_path)
