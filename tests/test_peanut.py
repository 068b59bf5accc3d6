"""PEANuT, whose update is a small network's answer to the weight, is merged as PEFT's live model has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from method_tools import judge, noise
from peft import PeanutConfig
from peft.tuners.peanut.layer import Linear
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from fossil_export import load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import METHODS
from fossil_export.methods._activations import ACTIVATIONS
from fossil_export.verifying.reference import EXACT


@pytest.mark.parametrize(
    "config",
    [{}, {"depth": 1, "scaling": 0.3}, {"depth": 3, "act_fn": "gelu"}, {"depth": 2, "act_fn": "silu", "r": 5}],
)
def test_peanut_answers_as_the_live_trained_model(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    judge(tmp_path, base, PeanutConfig, bits=False, **config)


def test_a_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    model = make_adapter(tmp_path / "peanut", base, noise, kind=PeanutConfig, depth=1, target_modules=["q_proj"])
    merge(tmp_path / "peanut", tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    weight = layer.base_layer.weight.data
    exact = weight.double() + layer.double()._compute_delta_weight("default", weight.double())
    assert torch.equal(weights(tmp_path / "merged")[f"{name}.weight"], exact.to(torch.bfloat16))
    assert verify(tmp_path / "merged", level="weights").parity


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 4), st.sampled_from(list(ACTIVATIONS)),
    st.floats(-2, 2), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_shape_depth_and_function_is_within_the_proven_bound(
    outputs: int, inputs: int, rank: int, depth: int, act_fn: str, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    weight = torch.randn(outputs, inputs, generator=generator)
    layer.weight.data = weight.clone()
    config = PeanutConfig(r=rank, depth=depth, act_fn=act_fn, scaling=scale)
    peft = Linear(layer, "x", rank, config)
    arrays = {}
    for role, matrix in {
        "A": peft.peanut_A["x"],
        "B": peft.peanut_B["x"],
        **{f"E{place}": one for place, one in enumerate(peft.peanut_encoders["x"])},
        **{f"D{place}": one for place, one in enumerate(peft.peanut_decoders["x"])},
    }.items():
        matrix.weight.data = torch.randn(matrix.weight.shape, generator=generator)
        arrays[role] = matrix.weight.data.clone()
    truth = peft.double()(torch.eye(inputs, dtype=torch.float64)).T.detach().numpy()

    numbers = {"r": rank, "depth": depth, "act_fn": act_fn, "scale": scale}
    found = weight.double().numpy().copy()
    wide = {role: value.double().numpy() for role, value in arrays.items()}
    bound = EXACT["peanut"].rebuild(weight.double().numpy(), wide, numbers, found)
    assert bound is not None
    assert abs(found - truth).max() <= 1e-9 * max(1.0, abs(truth).max())
    for kind in (lambda value: value.clone(), lambda value: value.numpy().copy()):
        ours = kind(weight)
        METHODS["peanut"].add(ours, {role: kind(value) for role, value in arrays.items()}, numbers, 0)
        step = abs(truth).clip(2.0**-126) * 2.0**-23
        assert (abs(torch.as_tensor(ours).numpy() - truth) <= bound + step / 2 * 1.001).all()


def test_functions_are_those_of_transformers() -> None:
    x = torch.linspace(-9, 9, 401, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(torch.as_tensor(function(x.numpy())), ACT2FN[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"act_fn": "relu2"}, "act_fn is 'relu2', expected one of relu"),
        ({"depth": 2}, r"E1 and D1 is missing, with depth=2"),
        ({"depth": 0}, "more layers than depth=0"),
        ({"depth": True}, "depth is True"),
        ({"r": 4}, "rank 8, but the config says r=4"),
        ({"scaling": "much"}, "scaling is 'much', expected a number"),
    ],
)
def test_a_config_that_contradicts_is_refused(change: dict[str, Any], why: str, base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "peanut", base, noise, kind=PeanutConfig, depth=1, target_modules=["q_proj"])
    edit_json(tmp_path / "peanut" / "adapter_config.json", **change)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "peanut")


@pytest.mark.parametrize("gone", ["peanut_A", "peanut_B", "peanut_encoders.0", "peanut_decoders.0"])
def test_a_layer_that_is_missing_is_named(gone: str, base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "peanut", base, noise, kind=PeanutConfig, depth=1, target_modules=["q_proj"])
    file = tmp_path / "peanut" / "adapter_model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if f"layers.0.self_attn.q_proj.{gone}" not in key}, file
    )
    with pytest.raises(AdapterError, match="is missing, with depth=1"):
        load_adapter(tmp_path / "peanut")


def test_two_of_them_are_not_combined(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_adapter(tmp_path / name, base, noise, kind=PeanutConfig, target_modules=["q_proj"])
    with pytest.raises(MergeError, match="peanut"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
