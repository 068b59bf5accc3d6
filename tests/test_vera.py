"""VeRA is merged as PEFT's live model has it, whatever part of the shared matrices a module takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, peft_merged, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from method_tools import judge, noise
from peft import VeraConfig
from peft.tuners.vera.layer import Linear
from safetensors.torch import load_file, save_file

from fossil_export import load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

QD = ["q_proj", "down_proj"]


@pytest.mark.parametrize("rank", [1, 7, 64])
def test_vera_is_merged_as_peft_merges_it_to_the_bit_and_answers_as_trained(
    rank: int, base: Path, tmp_path: Path
) -> None:
    judge(tmp_path, base, VeraConfig, r=rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "vera", base, noise, kind=VeraConfig, target_modules=QD)
    merge(tmp_path / "vera", tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "vera", dtype)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert verify(tmp_path / "merged", level="weights").parity


def test_conv1d_takes_it_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_fc"]
    judge(tmp_path, tmp_path / "base", VeraConfig, r=8, target_modules=targets, fan_in_fan_out=True)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 33), st.integers(0, 9), st.integers(0, 9),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_shape_and_rank_is_within_the_proven_bound(
    outputs: int, inputs: int, rank: int, more_rows: int, more_columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    weight = torch.randn(outputs, inputs, generator=generator)
    layer.weight.data = weight.clone()
    shared = {
        "A": torch.randn(rank, inputs + more_columns, generator=generator),
        "B": torch.randn(outputs + more_rows, rank, generator=generator),
    }
    own = {"b": torch.randn(outputs, generator=generator), "d": torch.randn(rank, generator=generator)}
    peft = Linear(layer, {"x": shared["A"]}, {"x": shared["B"]}, "x", VeraConfig(r=rank), r=rank)
    peft.vera_lambda_b["x"].data, peft.vera_lambda_d["x"].data = own["b"].clone(), own["d"].clone()
    arrays = {**shared, **own}
    eye = torch.eye(inputs, dtype=torch.float64)
    peft.vera_A, peft.vera_B = ({"x": shared[name].double()} for name in "AB")
    truth = peft.double()(eye).T.detach().numpy()

    numbers = {"r": rank}
    exact = EXACT["vera"]
    found = weight.double().numpy().copy()
    bound = exact.rebuild(
        weight.double().numpy(), {role: value.double().numpy() for role, value in arrays.items()}, numbers, found
    )
    assert abs(found - truth).max() < 1e-12
    assert bound is not None
    for kind in (lambda value: value.clone(), lambda value: value.numpy().copy()):
        ours = kind(weight)
        METHODS["vera"].add(ours, {role: kind(value) for role, value in arrays.items()}, numbers, 0)
        stored = torch.as_tensor(ours).numpy()
        step = abs(truth).clip(2.0**-126) * 2.0**-23
        assert (abs(stored - truth) <= bound + step).all()


def test_without_its_shared_matrices_it_is_refused_with_the_remedy(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "vera", base, noise, kind=VeraConfig, target_modules=QD, save_projection=False)
    with pytest.raises(AdapterError, match=r"save_projection is False, .*base_model\.vera_A .*save_projection to true"):
        load_adapter(tmp_path / "vera")


def test_that_remedy_works(base: Path, tmp_path: Path) -> None:
    model = make_adapter(tmp_path / "vera", base, noise, kind=VeraConfig, target_modules=QD, save_projection=False)
    file = tmp_path / "vera" / "adapter_model.safetensors"
    drawn = {f"base_model.vera_{name}": getattr(model.base_model, f"vera_{name}")["default"] for name in "AB"}
    save_file(load_file(file) | {key: value.contiguous() for key, value in drawn.items()}, file)
    edit_json(tmp_path / "vera" / "adapter_config.json", save_projection=True)
    merge(tmp_path / "vera", tmp_path / "merged")
    theirs = model.merge_and_unload().state_dict()
    ours = weights(tmp_path / "merged")
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    "gone, why",
    [
        ("base_model.vera_A", r"lacks base_model\.vera_A"),
        ("base_model.vera_B", r"lacks base_model\.vera_B"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", "vera_lambda_b is missing"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d", "vera_lambda_d is missing"),
    ],
)
def test_what_is_missing_is_named(gone: str, why: str, base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "vera", base, noise, kind=VeraConfig, target_modules=QD)
    file = tmp_path / "vera" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != gone}, file)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "vera")


def test_shared_matrices_that_are_too_small_or_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "vera", base, noise, kind=VeraConfig, target_modules=QD)
    file = tmp_path / "vera" / "adapter_model.safetensors"
    whole = load_file(file)
    for change, why in {
        "small": "vera_A has 40 columns",
        "rank": "do not go together",
        "whole numbers": "no matrix of floats",
        "infinite": r"vera_A holds infinite or NaN",
    }.items():
        shared = whole["base_model.vera_A"].clone()
        if change == "infinite":
            shared[0, 0] = float("nan")
        shared = {"small": shared[:, :40], "rank": shared[:5], "whole numbers": shared.int()}.get(change, shared)
        save_file(whole | {"base_model.vera_A": shared.contiguous()}, file)
        with pytest.raises((AdapterError, MergeError), match=why):
            merge(tmp_path / "vera", tmp_path / change)
