"""Bases that torchao quantized, saved as its own functions flatten them, against its own dequantization."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from quantized_bases import plain_model
from quantized_mxfp4 import assert_same_merge, stored_as, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError

quantization = pytest.importorskip("torchao.quantization")
flatten = pytest.importorskip("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
MXTensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor

Tensors = dict[str, torch.Tensor]
QPROJ = "model.layers.0.self_attn.q_proj"
GROUPS = quantization.PerGroup(32)
KINDS: dict[str, Any] = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int8, activations too": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int8, one scale": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
    "float8": lambda: quantization.Float8WeightOnlyConfig(),
    "float8, one scale": lambda: quantization.Float8WeightOnlyConfig(granularity=quantization.PerTensor()),
    "int4 in groups": lambda: quantization.IntxWeightOnlyConfig(torch.int4, GROUPS),
    "int3 with zeros": lambda: quantization.IntxWeightOnlyConfig(
        torch.int3, GROUPS, quantization.MappingType.ASYMMETRIC
    ),
    "int5 in rows": lambda: quantization.IntxWeightOnlyConfig(torch.int5),
    "int4, activations too": lambda: quantization.Int8DynamicActivationIntxWeightConfig(torch.int4, GROUPS),
}


def layer(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """A weight as torchao quantizes it."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = torch.nn.Parameter(weight)
    quantization.quantize_(module, config)
    found: torch.Tensor = module.weight.detach()
    return found


def folders(work: Path, config: Any, dtype: str = "bfloat16") -> tuple[Path, Path]:
    """(quantized, dequantized by torchao) folders of a random Llama."""
    base = plain_model(work / "plain", dtype)
    coded: Tensors = load_file(base / "model.safetensors")
    plain = dict(coded)
    for name, value in plain.items():
        if name.endswith("_proj.weight"):
            coded[name] = layer(value, config)
            plain[name] = coded[name].dequantize()
    tensors, metadata = flatten(coded)
    quantized = stored_as(work / "quantized", base, tensors, {"quant_method": "torchao"}, metadata)
    (work / "dequantized").mkdir()
    save_file(plain, work / "dequantized" / "model.safetensors", {"format": "pt"})
    (work / "dequantized" / "config.json").write_bytes((base / "config.json").read_bytes())
    return quantized, work / "dequantized"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merge_is_that_of_the_dequantized_base(kind: str, tmp_path: Path) -> None:
    quantized, dequantized = folders(tmp_path, KINDS[kind]())
    adapter = trained(dequantized, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert_same_merge(adapter, quantized, dequantized, tmp_path)
    with safe_open(tmp_path / "of_quantized" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # nothing that a loader would take for torchao's


@pytest.mark.parametrize("kind", ["int8", "int3 with zeros"])
def test_what_transformers_saves_is_read(kind: str, tmp_path: Path) -> None:
    """In many files, of which one may have the codes of a weight and another its scales."""
    base = plain_model(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=TorchAoConfig(KINDS[kind]())
    )
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    found = open_checkpoint(tmp_path / "base")
    assert len(found.files) > 5 and found.quantized is not None
    coded = 0
    for name, value in model.state_dict().items():
        info = found.tensors[name]
        if info.coding is not None:
            rows = CodedRows(info, partial(view_rows, found.home), 0, info.shape[0])[:]
            assert torch.equal(torch.from_numpy(rows.astype("float32")).bfloat16(), value.dequantize()), name
            coded += 1
    assert coded == 14 and found.tensors.keys() == load_file(base / "model.safetensors").keys()


def read(weight: Any, folder: Path) -> torch.Tensor:
    """What is read of one weight of torchao's."""
    tensors, metadata = flatten({"x.weight": weight})
    save_file(tensors, folder / "model.safetensors", metadata)
    base = open_checkpoint(folder)
    info = base.tensors["x.weight"]
    assert base.tensors.keys() == {"x.weight"} and info.coding is not None
    rows = CodedRows(info, partial(view_rows, base.home), 0, info.shape[0])
    start = info.shape[0] // 2
    found = torch.from_numpy(rows[:].astype("float32")).to(weight.dtype)
    later = CodedRows(info, partial(view_rows, base.home), start, info.shape[0])
    assert (later[:] == rows[:][start:]).all()
    return found


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_any_weight_has_the_bits_of_torchao(
    kind: str, rows: int, groups: int, dtype: torch.dtype, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    weight = layer(torch.randn(rows, groups * 32).to(dtype), KINDS[kind]())
    assert torch.equal(read(weight, tmp_path_factory.mktemp("base")), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("shape", [(24, 96), (3, 8, 64)])
def test_microscaled_weights_have_the_bits_of_torchao(
    dtype: torch.dtype, codes: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weight = MXTensor.to_mx((torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype), codes, 32)
    assert torch.equal(read(weight, tmp_path), weight.dequantize())


def refused(tensors: Tensors, metadata: dict[str, str], folder: Path) -> str:
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    with pytest.raises(CheckpointError) as caught:
        base = open_checkpoint(folder)
        info = base.tensors["x.weight"]
        CodedRows(info, partial(view_rows, base.home), 0, info.shape[0])[:]
    return str(caught.value)


def test_what_is_damaged_or_not_known_is_refused(tmp_path: Path) -> None:
    weight = layer(torch.randn(16, 64), KINDS["int4 in groups"]())
    tensors, metadata = flatten({"x.weight": weight})
    entry = json.loads(metadata["x.weight"])

    def told(names: list[str] | None = None, **fields: Any) -> dict[str, str]:
        kind = fields.pop("kind", entry["_type"])
        other = {"_type": kind, "_data": entry["_data"] | fields}
        return metadata | {
            "x.weight": json.dumps(other | {"_tensor_data_names": names or [*entry["_tensor_data_names"]]})
        }

    def says(text: str, changed: dict[str, Any] | None = None, words: dict[str, str] | None = None) -> None:
        found = {name: value for name, value in {**tensors, **(changed or {})}.items() if value is not None}
        assert text in refused(found, metadata if words is None else words, tmp_path)

    says("x.weight has no x._weight_scale, which the header", {"x._weight_scale": None})
    says("x._weight_qdata [16, 64] is stored as I16", {"x._weight_qdata": torch.zeros(16, 64, dtype=torch.int16)})
    says("x._weight_scale [16, 2] is stored as I8", {"x._weight_scale": torch.zeros(16, 2, dtype=torch.int8)})
    says("x._weight_scale [16, 1] must be [16, 2] for blocks of [1, 32]", {"x._weight_scale": torch.ones(16, 1)})
    says("x._weight_zero_point [3] must have 32 values", {"x._weight_zero_point": torch.ones(3, dtype=torch.int8)})
    says("x._weight_zero_point [16, 2] is stored as F32", {"x._weight_zero_point": torch.ones(16, 2)})
    says("x._weight_scale holds infinite or NaN values", {"x._weight_scale": torch.full((16, 2), torch.nan)})
    says("in blocks of [1, 33], which do not divide it", words=told(block_size=[1, 33]))
    says("in blocks of None, which do not divide it", words=told(block_size=None))
    says("of an unknown dtype", words=told(dtype=None))
    says("is torchao's Int4Tensor, whose values its GPU kernels alone tell", words=told(kind="Int4Tensor"))
    says("is torchao's NewTensor, which is not known here", words=told(kind="NewTensor"))
    scaled = ["qdata", "scale", "zero_point", "act_pre_scale"]
    says("multiplies what goes into x.weight", {"x._weight_act_pre_scale": torch.ones(64)}, told(scaled))
    says("is IntxUnpackedToInt8Tensor without scale", words=told(["qdata"]))
    says("does not tell how torchao quantized it", words={})
    mx = MXTensor.to_mx(torch.randn(16, 64), torch.float8_e4m3fn, 32)
    tensors, metadata = flatten({"x.weight": mx})
    entry = json.loads(metadata["x.weight"])
    says("whose scales are stored for one kind of GPU", words=told(is_swizzled_scales=True))
    says("is MXTensor of float8_e5m2 and F32", words=told(elem_dtype={"_type": "torch.dtype", "_data": "float8_e5m2"}))


def test_scales_of_activations_go(tmp_path: Path) -> None:
    quantized, dequantized = folders(tmp_path, KINDS["int8"]())
    with safe_open(quantized / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(quantized / "model.safetensors")
    entry = json.loads(metadata[f"{QPROJ}.weight"])
    entry["_tensor_data_names"].append("act_quant_scale")
    tensors[f"{QPROJ}._weight_act_quant_scale"] = torch.ones(1)
    save_file(tensors, quantized / "model.safetensors", metadata | {f"{QPROJ}.weight": json.dumps(entry)})
    adapter = trained(dequantized, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    assert_same_merge(adapter, quantized, dequantized, tmp_path)
