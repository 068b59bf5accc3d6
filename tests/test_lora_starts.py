"""LoRA that began from another weight than the base's is what the live trained model is: PEFT makes that weight again
on each load, and so does the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_start_tools
import numpy as np
import pytest
import torch
from conftest import QV, make_adapter, make_base, peft_merged, weights
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lora_start_tools import STARTS, answers, apart, gpt2
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from places_tools import edit_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verify_tools import flip, tamper

from fossil_export import load_adapter, merge, verify
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.errors import MergeError
from fossil_export.merging._engine import NumpyEngine, TorchEngine, Update, merge_slab
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

one_thread = lora_start_tools.one_thread
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unmerged(base: Path, adapter: Path) -> torch.nn.Module:
    """The live trained model, as PEFT loads it on the base, in float64 from there on."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).double().eval()


SCALED = {"use_rslora": True, "lora_alpha": 12, "rank_pattern": {"q_proj": 3}}


@pytest.mark.parametrize("dtype, more", [(torch.float32, {}), (torch.float16, {}), (torch.bfloat16, SCALED)])
@pytest.mark.parametrize("start", list(STARTS))
def test_it_is_merged_as_peft_merges_it_to_the_bit(
    start: str, dtype: torch.dtype, more: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **STARTS[start], **more)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert load_adapter(tmp_path / "adapter").variant == start and result.plan.count("merge") == 14
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", dtype)
    if start == "kasa" and dtype != torch.float32:
        # PEFT rounds the update before it adds it to such a base; the live model does not.
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
        assert apart(answers(merged), answers(unmerged(base, tmp_path / "adapter"))) < 2e-2
    else:
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    found = verify(tmp_path / "merged", level="weights")
    assert found.parity, found.problems


@pytest.mark.parametrize("start", list(STARTS))
def test_the_merged_model_answers_as_the_live_trained_one(start: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **STARTS[start])
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
    assert apart(answers(merged), answers(unmerged(base, tmp_path / "adapter"))) < 1e-6
    assert apart(answers(merged), answers(trained.double())) < 1e-6


def test_the_forward_level_begins_where_training_began(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj", "up_proj"], **STARTS["pissa"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = verify(tmp_path / "merged")
    assert found.parity and found.forward is not None and found.forward.artifact.relative_error < 1e-5


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, str, tuple[int, int], int, int, int]:
    start = draw(st.sampled_from(list(STARTS)))
    shape = (draw(st.integers(2, 40)), draw(st.integers(2, 40)))
    rank = draw(st.integers(1, min(shape) - (start == "kasa")))
    return (
        start,
        draw(st.sampled_from(list(DTYPES))),
        shape,
        rank,
        draw(st.integers(1, 20)),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_shape_rank_and_dtype_is_the_live_layer(case: tuple[str, str, tuple[int, int], int, int, int]) -> None:
    start, dtype, shape, rank, alpha, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    inner = torch.nn.Linear(shape[1], shape[0], bias=False)
    inner.weight.data = weight.clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, **STARTS[start])
    layer: Any = Linear(inner, "default", config=config, r=rank, lora_alpha=alpha)
    arrays = {"A": layer.lora_A["default"].weight.data.float(), "B": layer.lora_B["default"].weight.data.float()}
    arrays = {role: value + 0.1 * torch.randn(value.shape, generator=generator) for role, value in arrays.items()}
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = arrays["A"], arrays["B"]
    if start == "kasa":
        arrays["d"] = layer.lora_diag["default"].data.float()
    left = inner.weight.data.clone()
    with torch.no_grad():
        want = layer.double()(torch.eye(shape[1], dtype=torch.float64)).T
    numbers = {"r": rank, "scale": alpha / rank, "dtype": dtype, "brought": False, "transposed": False}
    method, check = METHODS[start], EXACT[start]
    assert method.mismatch({role: tuple(value.shape) for role, value in arrays.items()}, numbers, shape) is None
    exact = np.empty(shape)
    wide = {role: value.double().numpy() for role, value in arrays.items()}
    bound = check.rebuild(weight.double().numpy(), wide, numbers, exact)
    assert bound is not None
    assert (np.abs(exact - want.numpy()) <= bound + 1e-12).all()
    stored = (weight.view(torch.int16).numpy() if dtype == "BF16" else weight.numpy()).view(numpy_dtype(dtype))
    for engine in (NumpyEngine(), TorchEngine("cpu")):
        out = np.empty(shape, np.float32)
        part = {role: engine.widen(value.numpy(), "F32") for role, value in arrays.items()}
        try:
            merge_slab(engine, stored, out, [Update(method, part, numbers)], 0, shape[0])
        except MergeError as problem:
            assume("too close" not in str(problem))
            raise
        finally:
            engine.close()
        up = arrays["B"] * arrays["d"] if start == "kasa" else arrays["B"]
        assert np.abs(out - (left.float() + up @ arrays["A"] * (alpha / rank)).numpy()).max() < 1e-4
        assert (np.abs(out - want.numpy()) <= 2 * bound + np.abs(exact) * 2.0**-23).all()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_where_it_is_known_to_the_bit_what_it_began_from_the_check_is_that_of_a_lora_of_it(start: str) -> None:
    """But for a value that float32's sums may bring over a power of two, beyond which its steps are wider."""
    weight = np.diag([8.0, 3.0, 0.75, 0.3125])
    numbers = {"r": 1, "scale": 2.0, "dtype": "F32", "brought": False, "transposed": False}
    arrays = {"A": np.array([[1 - 2.0**-30, 0.3, -0.7, 1.9]]), "B": np.array([[1.1], [0.5], [-0.6], [0.01]])}
    found, wanted = np.empty((4, 4)), np.empty((4, 4))
    bound = EXACT[start].rebuild(weight, arrays, numbers, found)
    # Without the largest singular value; of a diagonal matrix Q is the unit one, and s times the first row goes.
    began = weight - np.diag([8.0 if start == "pissa" else 16.0, 0, 0, 0])
    of_lora = EXACT["lora"].rebuild(began, arrays, numbers, wanted)
    assert bound is not None and of_lora is not None
    assert np.array_equal(found, wanted) and found[1, 0] == 1 - 2.0**-30
    assert bound[1, 0] == 3 * of_lora[1, 0]
    bound[1, 0] = of_lora[1, 0]
    assert np.array_equal(bound, of_lora)


@pytest.mark.parametrize("start", list(STARTS))
def test_one_wrong_bit_is_found(start: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["up_proj"], **STARTS[start])
    merge(tmp_path / "adapter", tmp_path / "merged")
    tamper(tmp_path / "merged", "model.layers.1.mlp.up_proj.weight", flip)
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert "up_proj.weight 1 of" in problem


@pytest.mark.parametrize("start", list(STARTS))
def test_a_merge_into_the_bases_own_weights_would_be_found(start: str, tmp_path: Path, base: Path) -> None:
    """What every tool does that takes such an adapter for a plain one."""
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["up_proj"], **STARTS[start])
    merge(tmp_path / "adapter", tmp_path / "merged")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    up, down = (state[f"base_model.model.{name}.lora_{half}.weight"] for half in "BA")
    plain = weights(base)[f"{name}.weight"] + up @ down
    tamper(tmp_path / "merged", f"{name}.weight", lambda old: plain)
    assert not verify(tmp_path / "merged", level="weights").parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dora_may_begin_so_too(start: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=QV, **STARTS[start])
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", dtype)
    for key, value in weights(tmp_path / "merged").items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=0)
    assert verify(tmp_path / "merged", level="weights").parity


@pytest.mark.parametrize("start", list(STARTS))
def test_a_head_that_peft_saves_beside_it_has_begun_already(start: str, tmp_path: Path, base: Path) -> None:
    """PEFT saves `lm_head.base_layer.weight`, which is the weight training began from."""
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["lm_head", "q_proj"], **STARTS[start])
    assert "lm_head.weight" in load_adapter(tmp_path / "adapter").saved
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    for key, value in weights(tmp_path / "merged").items():
        assert torch.equal(value, theirs[key]), key
    assert verify(tmp_path / "merged", level="weights").parity


@pytest.mark.parametrize("start", list(STARTS))
def test_what_is_tied_to_a_head_began_with_it(start: str, tmp_path: Path) -> None:
    """PEFT changes the weight in place, which is the embedding's too."""
    base = make_base(tmp_path / "base", tie=True)
    config = {"kind": LoraConfig, "target_modules": ["lm_head", "q_proj"], **STARTS[start]}
    live = make_adapter(tmp_path / "adapter", base, **config)
    merge(tmp_path / "adapter", tmp_path / "merged")
    embedding = live.get_base_model().model.embed_tokens.weight
    assert not torch.allclose(embedding, weights(base)["model.embed_tokens.weight"], atol=1e-3)
    assert torch.equal(weights(tmp_path / "merged")["model.embed_tokens.weight"], embedding)
    merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((merged - answers(live)).norm() / merged.norm()) < 1e-5
    assert verify(tmp_path / "merged", level="weights").parity
    edit_weights(tmp_path / "adapter", lambda found: found.pop("base_model.model.lm_head.base_layer.weight"))
    with pytest.raises(MergeError, match=r"lm_head.weight is tied to model.embed_tokens.weight, and training began"):
        merge(tmp_path / "adapter", tmp_path / "other")


def test_an_embedding_is_targeted_without_such_a_start(tmp_path: Path, base: Path) -> None:
    make_adapter(
        tmp_path / "adapter", base, kind=LoraConfig, target_modules=["embed_tokens", "q_proj"], **STARTS["pissa"]
    )
    assert load_adapter(tmp_path / "adapter").variant.split("+") == ["lora_embedding", "pissa"]
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(tmp_path / "merged").items())


def test_pissa_of_gpt2s_layers_is_that_of_their_matrices(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=targets, **STARTS["pissa"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    for key, value in weights(tmp_path / "merged").items():
        torch.testing.assert_close(value, theirs[f"transformer.{key}" if f"transformer.{key}" in theirs else key])
    assert verify(tmp_path / "merged").parity
