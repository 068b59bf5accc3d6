"""Weights as a quantized training saw them, against what transformers and bitsandbytes make of them when loading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import quantized_bnb as tools
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, GPT2Config, GPT2LMHeadModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints.quantized import _trained_on, coded
from fossil_export.checkpoints.quantized._trained_on import QUANTIZERS, OfConv1d, TrainedOn
from fossil_export.errors import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def as_seen(value: torch.Tensor, seen: TrainedOn, start: int = 0, stop: int | None = None, turned: bool = False) -> Any:
    """Rows of a weight, as training saw them."""
    memory = tools.InMemory({"w": value}, {})
    info = memory.stored.tensors["w"]
    coding = OfConv1d(info, seen) if turned else QUANTIZERS[seen.kind](info, seen)
    weight = coded("w", seen.compute_dtype, info.shape, coding)
    return tools.as_torch(CodedRows(weight, memory.rows_of, start, info.shape[0] if stop is None else stop)[:])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nf4_is_what_the_library_makes_of_the_weight_in_the_models_dtype(data: st.DataObject) -> None:
    stored, dtype = (data.draw(st.sampled_from(sorted(DTYPES))) for _ in range(2))
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300)))
    block, nested = data.draw(st.sampled_from([64, 128, 4096])), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    value = (torch.randn(shape) * 0.03).to(DTYPES[stored])
    value[0] = 0
    options = {"quant_type": "nf4", "blocksize": block, "compress_statistics": nested}
    codes, state = bnb.quantize_4bit(value.to(DTYPES[dtype]), **options)
    truth = tools.dequantized4(codes, state, value.shape)
    seen = TrainedOn("nf4", block, nested, dtype)
    whole = as_seen(value, seen)
    assert whole.dtype == DTYPES[dtype]
    if nested:  # on a CPU the library takes the nearest but one of 256 levels for some scales
        step = 0.02 * float(value.abs().max())
        assert torch.allclose(whole.float(), truth.float(), rtol=0, atol=step)
    else:
        assert torch.equal(whole, truth)
    first = data.draw(st.integers(0, shape[0] - 1))
    last = data.draw(st.integers(first, shape[0]))
    assert torch.equal(as_seen(value, seen, first, last), whole[first:last])


# What an H200 made of elements that lie in the middle of two levels: dtype, scale of their block, element, and the code
# of fp4; or the number of int8.
FP4_ON_CUDA = [
    ("BF16", 0.064453125, -0.018798828125, 15),
    ("BF16", 0.064453125, 0.0537109375, 2),
    ("BF16", 0.06884765625, -0.01434326171875, 15),
    ("BF16", 0.0732421875, 0.0213623046875, 7),
    ("BF16", 0.0732421875, -0.0152587890625, 14),
    ("F16", 0.0684814453125, -0.0142669677734375, 15),
    ("F16", 0.07342529296875, -0.061187744140625, 10),
    ("F16", 0.08056640625, 0.067138671875, 3),
    ("F16", 0.0904541015625, 0.07537841796875, 3),
    ("F16", 0.09228515625, 0.01922607421875, 7),
]
INT8_ON_CUDA = [(0.09423828125, 0.047119140625, 64), (0.10205078125, -0.051025390625, -64)]


@pytest.mark.parametrize(("dtype", "scale", "element", "code"), FP4_ON_CUDA)
def test_fp4_between_two_levels_is_rounded_as_cuda_does(dtype: str, scale: float, element: float, code: int) -> None:
    value = torch.tensor([[scale, element] + [0.0] * 62]).to(DTYPES[dtype])
    found = as_seen(value, TrainedOn("fp4", compute_dtype=dtype))
    level = bnb.get_4bit_type("fp4", "cpu")[code]
    assert found[0, 1] == (level * scale).to(DTYPES[dtype])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 200), st.sampled_from([64, 256]), st.integers(0, 99))
def test_fp4_is_nearly_everywhere_what_the_library_makes_on_a_cpu(
    rows: int, columns: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    value = torch.randn(rows, columns)
    codes, state = bnb.quantize_4bit(value, quant_type="fp4", blocksize=block)
    truth = tools.dequantized4(codes, state, value.shape)
    found = as_seen(value, TrainedOn("fp4", block, compute_dtype="F32"))
    assert (found != truth).float().mean() <= 1e-3


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.integers(1, 30), st.integers(1, 200), st.integers(0, 99))
def test_int8_is_by_rows_of_float16(dtype: str, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    value = torch.randn(rows, columns)
    value[0] = 0
    value = (value * 7).to(DTYPES[dtype])  # beyond the threshold of outliers, which concerns activations
    truth = tools.quantized8("w", value)[1]
    found = as_seen(value, TrainedOn("int8", compute_dtype=dtype))
    near = found != truth
    # A number in the middle of two may be rounded to the other one on CUDA.
    assert near.float().mean() <= 0.01
    # One step, and the rounding of both to bfloat16.
    step = float(value.abs().max()) * (1.02 / 127 + 1 / 128)
    assert torch.allclose(found.float(), truth.float(), rtol=0, atol=step)


@pytest.mark.parametrize(("scale", "element", "number"), INT8_ON_CUDA)
def test_int8_between_two_numbers_is_rounded_as_cuda_does(scale: float, element: float, number: int) -> None:
    found = as_seen(torch.tensor([[scale, element]]).bfloat16(), TrainedOn("int8", compute_dtype="F32"))
    truth = bnb.int8_vectorwise_dequant(torch.tensor([[127, number]], dtype=torch.int8), torch.tensor([scale]))
    assert torch.equal(found, truth)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_fp8_is_what_transformers_makes_of_it(dtype: str) -> None:
    torch.manual_seed(0)
    value = (torch.randn(384, 256) * 0.03).to(DTYPES[dtype])
    value[:128, :128] = 0
    owner: Any = SimpleNamespace(quantization_config=FineGrainedFP8Config())
    made = Fp8Quantize(owner)._quantize_one("a.weight", value)
    truth = Fp8Dequantize(owner)._dequantize_one(made["a.weight"], made["a.weight_scale_inv"], DTYPES[dtype])
    seen = TrainedOn("fp8", compute_dtype=dtype)
    assert torch.equal(as_seen(value, seen), truth)
    assert torch.equal(as_seen(value, seen, 100, 301), truth[100:301])
    odd = value[:100]  # which blocks do not divide, and transformers leaves as it is
    assert torch.equal(as_seen(odd, seen), odd)


def test_a_conv1d_is_quantized_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    plain = GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16()
    plain.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    weight = model.transformer.h[0].mlp.c_fc.weight
    truth = bnb.dequantize_4bit(weight.data, weight.quant_state).T
    found = as_seen(plain.transformer.h[0].mlp.c_fc.weight.detach(), TrainedOn("nf4"), 3, 41, turned=True)
    assert torch.equal(found, truth[3:41])


def test_a_conv1d_of_many_pieces_is_the_transpose_of_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trained_on, "PIECE", 1 << 10)
    torch.manual_seed(0)
    value = torch.randn(80, 96).bfloat16()
    for kind in ("nf4", "int8"):
        seen = TrainedOn(kind, double_quant=kind == "nf4")
        assert torch.equal(as_seen(value, seen, turned=True), as_seen(value.T.contiguous(), seen).T)


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
@pytest.mark.parametrize("nested", [False, True])
def test_values_that_the_dtype_does_not_have_are_refused(kind: str, nested: bool) -> None:
    value = torch.full((128, 128), 1e6)
    with pytest.raises(CheckpointError, match="w holds values that are not finite as F16"):
        as_seen(value, TrainedOn(kind, double_quant=nested, compute_dtype="F16"))
