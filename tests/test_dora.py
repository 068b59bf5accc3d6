"""DoRA is what the live trained model computes, and PEFT's own merge up to the last steps of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LINEARS, edit_json, make_adapter, make_base, peft_merged, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Conv2d, Embedding, Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verify_tools import flip, tamper

from fossil_export import FossilExportError, convert, load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError
from fossil_export.merging._engine import NumpyEngine, TorchEngine, Update, merge_slab
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

TOKENS = torch.arange(20)[None]
SETTINGS: dict[str, dict[str, Any]] = {
    "every layer": {},
    "rslora and patterns": {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"q_proj": 3}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The furthest two results lie apart, in steps of their dtype, and the share of values that differ."""
    size = torch.finfo(ours.dtype).eps * theirs.abs().double().clamp(min=1e-30)
    apart = (ours.double() - theirs.double()).abs() / size
    return float(apart.max()), float((ours != theirs).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_dora_is_merged_as_peft_merges_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, **SETTINGS[name])
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", dtype)
    before = weights(base)
    assert set(result.survival) == {key for key in ours if not torch.equal(before[key], ours[key])}
    for key in ours:
        # PEFT adds the squares up in float32, we in float64: the lengths differ by some steps.
        furthest, share = steps_apart(ours[key], theirs[key])
        assert (furthest <= 8) if dtype == torch.float32 else (furthest <= 2 and share < 1e-3), key
    found = verify(tmp_path / "merged", level="weights")
    assert found.parity, found.problems


def test_the_merged_model_answers_as_the_live_trained_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    settings = {"use_dora": True, "target_modules": [*LINEARS, "embed_tokens", "lm_head"]}
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **settings)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
    plain = AutoModelForCausalLM.from_pretrained(base).double().eval()
    with torch.no_grad():
        ours, theirs, none = merged(TOKENS).logits, trained.double()(TOKENS).logits, plain(TOKENS).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6 < 1e-2 < float((none - theirs).norm() / theirs.norm())


def live(layer: Any, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """W' by what the unmerged layer answers, in float64."""
    layer = layer.double().eval()
    with torch.no_grad():
        if kind == "embedding":
            found: torch.Tensor = layer(torch.arange(weight.shape[0]))
            return found
        if kind == "linear":
            found = layer(torch.eye(weight.shape[1], dtype=torch.float64)).T
            return found
        # Of a convolution with one kernel-sized input the answer is one product of all weights of an output.
        ones = torch.eye(weight[0].numel(), dtype=torch.float64).reshape(-1, *weight.shape[1:])
        found = layer(ones)[:, :, 0, 0].T.reshape(weight.shape)
        return found


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, torch.dtype, tuple[int, ...], int, int, int]:
    kind = draw(st.sampled_from(["linear", "embedding", "convolution"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shape: tuple[int, ...] = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    if kind == "convolution":
        shape = (*shape, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return kind, dtype, shape, draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_shape_rank_and_dtype_is_the_live_layer(
    case: tuple[str, torch.dtype, tuple[int, ...], int, int, int],
) -> None:
    kind, dtype, shape, rank, alpha, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=True)
    inner: Any
    if kind == "convolution":
        inner = torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    else:
        inner = torch.nn.Embedding(*shape) if kind == "embedding" else torch.nn.Linear(shape[1], shape[0], bias=False)
    inner.weight.data = weight.clone()
    made = {"linear": Linear, "embedding": Embedding, "convolution": Conv2d}[kind]
    layer: Any = made(inner, "default", config=config, r=rank, lora_alpha=alpha).float()
    inner.weight.data = weight.clone()
    arrays = {}
    for role, names in {"A": ("lora_A", "lora_embedding_A"), "B": ("lora_B", "lora_embedding_B")}.items():
        found = getattr(layer, names[kind == "embedding"])["default"]
        value = found if kind == "embedding" else found.weight
        value.data = torch.randn(value.shape, generator=generator) * 0.3
        arrays[role] = value.data
    length = layer.lora_magnitude_vector["default"].weight
    length.data = torch.rand(length.shape, generator=generator) + 0.5
    arrays["m"] = length.data
    method = METHODS["dora_embedding" if kind == "embedding" else "dora"]
    numbers = {"r": rank, "scale": alpha / rank}
    shapes = {role: tuple(value.shape) for role, value in arrays.items()}
    rows = weight.reshape(shape[0], -1)
    assert method.mismatch(shapes, numbers, tuple(rows.shape)) is None  # type: ignore[arg-type]
    assert method.dimensions(shapes) == len(shape)
    stored = rows.float().numpy() if dtype == torch.bfloat16 else rows.numpy()
    want = live(layer, weight, kind).reshape(rows.shape).numpy()
    exact = np.empty(rows.shape)
    check = EXACT["dora_embedding" if kind == "embedding" else "dora"]
    wide = {role: value.double().numpy() for role, value in arrays.items()}
    bound = check.rebuild(rows.double().numpy(), check.part(wide, 0, shape[0]), numbers, exact)
    np.testing.assert_allclose(exact, want, rtol=1e-9, atol=1e-9)
    assert bound is not None
    for engine in (NumpyEngine(), TorchEngine("cpu")):
        out = np.empty(rows.shape, np.float32)
        part = {role: engine.widen(value.numpy(), "F32") for role, value in arrays.items()}
        merge_slab(engine, stored, out, [Update(method, part, numbers)], 0, shape[0])
        engine.close()
        assert (np.abs(out - exact) <= bound + np.abs(exact) * 2.0**-24).all()
        update = np.asarray(method.update(rows.float().numpy(), {r: v.numpy() for r, v in arrays.items()}, numbers, 0))
        np.testing.assert_allclose(update + rows.float().numpy(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_one_wrong_bit_is_found(module: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    targets = ["up_proj", "embed_tokens"]
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=targets)
    merge(tmp_path / "adapter", tmp_path / "merged")
    tamper(tmp_path / "merged", f"{module}.weight", flip)
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert f"{module}.weight 1 of" in problem


def test_gpt2s_layers_have_their_lengths_over_the_inputs(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=32)).save_pretrained(base)
    targets = ["c_attn", "c_proj", "c_fc"]
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=targets)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
    with torch.no_grad():
        ours, theirs = merged(TOKENS).logits, trained.double()(TOKENS).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert verify(tmp_path / "merged").parity


def saved_as(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_lengths_by_the_parameters_own_name_are_the_same(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    merge(tmp_path / "adapter", tmp_path / "one")
    end = "lora_magnitude_vector"
    rename = lambda state: {k.replace(end, f"{end}.weight"): v for k, v in state.items()}  # noqa: E731
    saved_as(tmp_path / "adapter", rename)
    merge(tmp_path / "adapter", tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "config, change, why",
    [
        ({"use_dora": False}, None, "does not say use_dora"),
        ({}, lambda name: "q_proj.lora_magnitude" in name, "use_dora, but the lora_magnitude_vector is missing"),
        ({}, lambda name: "embed_tokens.lora_magnitude" in name, "use_dora, but the lora_magnitude_vector is missing"),
        ({}, lambda name: "q_proj.lora_A" in name, "lora_A is missing"),
        ({}, lambda name: "layers.0.self_attn.q_proj.lora_A" in name or "0.self_attn.q_proj.lora_B" in name, "missing"),
    ],
)
def test_lengths_and_config_that_contradict_each_other_are_refused(
    config: dict[str, Any], change: Any, why: str, tmp_path: Path, base: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", **config)
    if change is not None:
        saved_as(tmp_path / "adapter", lambda state: {k: v for k, v in state.items() if not change(k)})
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


def test_lengths_of_another_layer_are_refused(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=["q_proj"])
    cut = lambda state: {k: v[:-1].clone() if "magnitude" in k else v for k, v in state.items()}  # noqa: E731
    saved_as(tmp_path / "adapter", cut)
    with pytest.raises(AdapterError, match="not one for each of 48 outputs"):
        load_adapter(tmp_path / "adapter")


def test_dora_is_neither_weighed_nor_added_to_another_adapter(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "dora", base, kind=LoraConfig, use_dora=True, target_modules=["q_proj"])
    make_adapter(tmp_path / "lora", base, kind=LoraConfig, target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"cannot be taken 0.5 times"):
        merge([tmp_path / "dora"], tmp_path / "merged", weights=[0.5])
    with pytest.raises(MergeError, match="cannot be added up"):
        merge([tmp_path / "dora", tmp_path / "lora"], tmp_path / "merged")


def test_a_lora_of_it_is_only_made_if_an_approximate_one_is_asked_for(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(FossilExportError, match="rank"):
        convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    found = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=48)
    assert found.details["relative_error"] < 1e-5
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base)
    near = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    for name, value in weights(tmp_path / "merged").items():
        torch.testing.assert_close(near[name], value, rtol=1e-4, atol=1e-5)
