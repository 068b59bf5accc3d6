"""LoRA, with all that its config can say, is what PEFT makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import LINEARS, edit_json, make_adapter, make_base, peft_merged, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from fossil_export import load_adapter, merge, verify
from fossil_export._threads import one_torch_thread
from fossil_export.errors import AdapterError, MergeError
from fossil_export.merging._engine import NumpyEngine, TorchEngine, Update, merge_slab
from fossil_export.methods import METHODS

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 13},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "patterns": {"rank_pattern": {"q_proj": 4, r"layers\.1\..*up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "every linear layer": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "some layers": {"layers_to_transform": [1]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_lora_is_merged_as_peft_merges_it_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **SETTINGS[name])
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", dtype)
    changed = {key for key, value in weights(base).items() if not torch.equal(value, ours[key])}
    assert set(result.survival) == changed
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert verify(tmp_path / "merged", level="weights").parity


def test_biases_of_lora_are_added_to_the_layers_own(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90,
        num_key_value_heads=2,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, lora_bias=True, target_modules=["q_proj", "v_proj"])
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result.plan.count("merge") == 8
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", torch.float32)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert verify(tmp_path / "merged", level="weights").parity


def test_a_bias_that_the_layer_has_no_place_for_is_refused(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "lora", base, kind=LoraConfig, lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"q_proj\.bias"):
        merge(tmp_path / "lora", tmp_path / "merged")


@pytest.mark.parametrize(
    "field, why",
    [
        ({"alora_invocation_tokens": [1, 2]}, "depends on the tokens"),
        ({"init_lora_weights": "loftq"}, "training began from changed weights"),
        ({"use_qalora": True}, "pooled"),
        ({"lora_alpha": "many"}, "expected a number"),
        ({"lora_alpha": float("nan")}, "expected a number"),
        ({"rank_pattern": {"q_proj": 5}}, "rank 8, but the config says r=5"),
        ({"something_new": 1}, "does not understand"),
    ],
)
def test_what_is_no_plain_update_is_refused_and_the_line_says_why(
    field: dict[str, Any], why: str, base: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "lora", base, kind=LoraConfig, target_modules=LINEARS)
    edit_json(tmp_path / "lora" / "adapter_config.json", **field)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "lora")


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.dtype, tuple[int, int], int, float, int]:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    shape = (draw(st.integers(1, 90)), draw(st.integers(1, 90)))
    return (
        dtype,
        shape,
        draw(st.integers(1, 40)),
        draw(st.sampled_from([1, 3, 8, 16, 7.5])),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=80, deadline=None)
@given(layers(), st.booleans())
def test_any_shape_rank_and_dtype_has_pefts_bits_by_the_same_library(
    layer: tuple[torch.dtype, tuple[int, int], int, float, int], rslora: bool
) -> None:
    dtype, shape, rank, alpha, seed = layer
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    linear.weight.data = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    stored = linear.weight.data.clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora)
    lora = Linear(linear, "default", config, r=rank, lora_alpha=alpha)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arrays = {}
    for role, part in (("A", lora.lora_A), ("B", lora.lora_B)):
        part["default"].weight.data = torch.randn(part["default"].weight.shape, generator=generator).to(wide)
        arrays[role] = part["default"].weight.data.numpy()
    with one_torch_thread(torch):  # as the engine; several add up in another order
        lora.merge()
    method, shapes = METHODS["lora"], {role: array.shape for role, array in arrays.items()}
    numbers = method.read({"r": rank, "lora_alpha": alpha, "use_rslora": rslora}, "m", shapes, "here")
    assert numbers is not None
    before = stored.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else stored.numpy()
    results = []
    for engine in (TorchEngine("cpu"), NumpyEngine()):
        out = np.empty_like(before)
        widened = {
            role: engine.widen(array, "F64" if wide == torch.float64 else "F32") for role, array in arrays.items()
        }
        merge_slab(engine, before, out, [Update(method, widened, numbers)], 0, shape[0])
        results.append(out.astype(np.float64))
        engine.close()
    theirs = linear.weight.data.double().numpy()
    assert np.array_equal(results[0], theirs)
    # Another library adds up the r products in another order.
    size = (
        (np.abs(arrays["B"]) @ np.abs(arrays["A"])) * abs(numbers["scale"]) * (rank + 2) * float(torch.finfo(wide).eps)
    )
    step = np.abs(theirs) * float(torch.finfo(dtype).eps) + float(torch.finfo(dtype).tiny)
    assert (np.abs(results[1] - theirs) <= size + step).all()
