"""(IA)³, RoAd and LN tuning are what the live model has, in weights, biases and norms."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base, weights
from graphs import make_case, make_graph, run
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LNTuningConfig, PeftModel, RoadConfig, get_peft_model
from peft.tuners.road.layer import Linear as RoadLinear
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from tuner_tools import assert_caught, assert_live, assert_rounded, biased_base, logits, set_config

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError, OnnxError
from fossil_export.methods import METHODS
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._trainer import open_trainer
from fossil_export.verifying.reference import EXACT

SETTINGS: dict[str, dict[str, Any]] = {
    "ia3": {"kind": IA3Config, "feedforward_modules": ["down_proj"]},
    "ia3, by a regular expression": {
        "kind": IA3Config,
        "target_modules": r".*layers\.1\..*(q_proj|up_proj)",
        "feedforward_modules": r".*up_proj",
    },
    "ia3, of outputs alone": {"kind": IA3Config, "feedforward_modules": []},
    "road_1": {"kind": RoadConfig, "group_size": 8},
    "road_2": {"kind": RoadConfig, "group_size": 4, "variant": "road_2"},
    "road_4": {"kind": RoadConfig, "group_size": 16, "variant": "road_4"},
    "norms": {"kind": LNTuningConfig, "target_modules": ["input_layernorm", "norm"]},
}
BIASES = ("ia3", "ia3, of outputs alone", "road_1", "road_2", "road_4")


@pytest.mark.parametrize("name", list(SETTINGS))
def test_in_float64_the_merged_model_is_the_live_one(name: str, tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", torch.float64)
    after, before = assert_live(base, tmp_path, **SETTINGS[name]), weights(base)
    key = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(after[key], before[key]) == (name not in BIASES)


@pytest.mark.parametrize("name", ["ia3, of outputs alone", "road_2"])
def test_a_class_that_has_biases_by_its_config_alone_may_have_none(name: str, tmp_path: Path) -> None:
    """Llama's projections have biases if attention_bias says so, and nearly no Llama does."""
    base = make_base(tmp_path / "base", torch.float64)
    after = assert_live(base, tmp_path, **SETTINGS[name])
    assert after.keys() == weights(base).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ia3", "road_4", "norms"])
def test_merged_weights_are_the_truth_rounded_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # PEFT rounds RoAd's factors to bfloat16 before it multiplies; the others have its bits.
    base = biased_base(tmp_path / "base", dtype)
    assert_rounded(base, tmp_path, dtype, name != "road_4", **SETTINGS[name])
    wrong = "model.layers.1.input_layernorm.weight" if name == "norms" else "model.layers.0.self_attn.k_proj.bias"
    assert_caught(tmp_path / "merged", wrong)


def gpt2(folder: Path) -> tuple[Any, Any]:
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel, GPT2LMHeadModel(config)


def resnet(folder: Path) -> tuple[Any, Any]:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    return ResNetForImageClassification, ResNetForImageClassification(config)


@pytest.mark.parametrize(
    "make, config",
    [
        (gpt2, {"kind": IA3Config, "target_modules": ["c_attn", "c_fc", "c_proj"], "feedforward_modules": ["c_fc"]}),
        (gpt2, {"kind": LNTuningConfig, "target_modules": ["ln_1", "ln_f"]}),
        (resnet, {"kind": IA3Config, "target_modules": ["convolution"], "feedforward_modules": []}),
    ],
)
def test_transposed_layers_norms_with_biases_and_convolutions(make: Any, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class, model = make(tmp_path)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.1
    model.double().save_pretrained(tmp_path / "base")
    live = make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=model_class, **config)
    merge(tmp_path / "adapter", tmp_path / "merged")
    models = [model_class.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("base", "merged")]
    inputs = torch.arange(3, 27).reshape(2, 12) if make is gpt2 else torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        truth, base, merged = (one.eval()(inputs).logits for one in (live, *models))
    assert (truth - base).abs().max() > 1e-3 and torch.allclose(merged, truth, rtol=0, atol=1e-12)
    assert verify(tmp_path / "merged", level="weights").parity


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_road_of_any_size_is_pefts_in_numpy_and_pytorch_in_any_groups(data: st.DataObject) -> None:
    half, groups, inputs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    variant = data.draw(st.sampled_from(["road_1", "road_2", "road_4"]))
    outputs = 2 * half * groups
    config = RoadConfig(variant=variant, group_size=2 * half, init_weights=False)
    base = torch.nn.Linear(inputs, outputs).double()
    layer = RoadLinear(base, "default", config=config)
    arrays = {"theta": layer.road_theta["default"].data, "alpha": layer.road_alpha["default"].data}
    shapes = {role: tuple(array.shape) for role, array in arrays.items()}
    x = torch.eye(inputs, dtype=torch.float64)
    with torch.no_grad():
        bias = layer(torch.zeros(1, inputs, dtype=torch.float64))
        truth = (layer(x) - bias).T.numpy()
    config_json = {"variant": variant, "group_size": 2 * half}
    takes = [
        name for name in ("road_1", "road_2", "road_4") if METHODS[name].read(config_json, "m", shapes, "") is not None
    ]
    assert takes == [variant]
    method, exact = METHODS[variant], EXACT[variant]
    numbers = method.read(config_json, "m", shapes, "here")
    assert numbers is not None and method.mismatch(shapes, numbers, (outputs, inputs)) is None
    assert method.mismatch(shapes, numbers, (outputs + 2 * half, inputs)) is not None
    first = data.draw(st.integers(0, groups - 1))
    start, stop = 2 * half * first, 2 * half * data.draw(st.integers(first + 1, groups))
    weight = base.weight.detach()[start:stop]
    for wanted, stored, name in (
        (truth, weight, variant),
        (bias.T.numpy(), base.bias.detach()[start:stop, None], f"{variant}_bias"),
    ):
        for convert_to in (torch.clone, lambda array: array.numpy().copy()):
            rows = convert_to(stored)
            part = METHODS[name].part({role: convert_to(array) for role, array in arrays.items()}, start, stop)
            update = METHODS[name].update(rows, part, numbers, 0)
            METHODS[name].add(rows, part, numbers, 0)
            np.testing.assert_allclose(np.asarray(rows), wanted[start:stop], rtol=0, atol=1e-13)
            np.testing.assert_allclose(np.asarray(update), wanted[start:stop] - stored.numpy(), rtol=0, atol=1e-13)
    checked = np.empty((stop - start, inputs))
    part = exact.part({role: array.numpy() for role, array in arrays.items()}, start, stop)
    assert exact.rebuild(weight.numpy(), part, numbers, checked) is not None
    np.testing.assert_allclose(checked, truth[start:stop], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["ia3", "road_2"])
def test_several_follow_one_another_as_in_the_live_model(name: str, tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", torch.float64)
    for number in range(2):

        def change(model: torch.nn.Module, seed: int = number) -> None:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape) * 0.1

        make_adapter(tmp_path / f"{number}", base, change, **SETTINGS[name])
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "0", adapter_name="0")
    live.load_adapter(tmp_path / "1", adapter_name="1")
    live.base_model.set_adapter(["0", "1"])
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    truth = logits(live.eval())
    assert torch.allclose(logits(merged), truth, rtol=0, atol=1e-11 * float(truth.abs().max()))
    assert verify(tmp_path / "merged", level="weights").parity
    assert_caught(tmp_path / "merged", "model.layers.0.self_attn.k_proj.weight", 2**36)  # of the 2**52 in 1.0
    with pytest.raises(MergeError, match=r"cannot be taken 0\.5 times"):
        merge([tmp_path / "0"], tmp_path / "half", weights=[0.5])


def test_two_norms_in_one_place_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for name in ("one", "two"):
        make_adapter(tmp_path / name, base, **SETTINGS["norms"])
    with pytest.raises(MergeError, match="such adapters cannot be added up"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")


def test_the_forward_check_runs_them_beside_the_model(tmp_path: Path) -> None:
    for name in ("ia3", "norms"):
        base = biased_base(tmp_path / name / "base", torch.bfloat16)
        make_adapter(tmp_path / name / "adapter", base, **SETTINGS[name])
        found = load_adapter(tmp_path / name / "adapter")
        ids = [3, 1, 4, 15]
        truth = open_trainer(Sum.of(found), base, base, "float64", "cpu").logits(ids)
        trainer = open_trainer(Sum.of(found), base, base, "bfloat16", "cpu").logits(ids)
        assert 0 < np.abs(np.asarray(truth) - np.asarray(trainer, np.float64)).max() < 0.05


def test_a_lora_has_no_place_for_biases_and_norms(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base")
    for name in ("ia3", "norms"):
        make_adapter(tmp_path / name, base, **SETTINGS[name])
        with pytest.raises(FossilExportError, match="LoRA has no place"):
            convert(tmp_path / name, tmp_path / "lora", to="lora", rank=4)


@pytest.mark.parametrize(
    "name, config, why",
    [
        ("ia3", {"feedforward_modules": ["q_proj"]}, "is for inputs, but the config's feedforward_modules say outputs"),
        ("ia3, of outputs alone", {"feedforward_modules": "(("}, "not a valid regular expression"),
        ("ia3", {"feedforward_modules": [3]}, "expected a list of names"),
        ("ia3", {"ia3_alpha": 2}, "does not understand"),
        ("road_1", {"variant": "road_2"}, "does not go with road_2"),
        ("road_1", {"group_size": 7}, "expected an even number"),
        ("road_1", {"group_size": 64}, "does not go with road_1 and group_size=64"),
        ("road_1", {"variant": "road_8"}, "expected road_1 or road_2 or road_4"),
        ("norms", {"layers_to_transform": None, "ln_eps": 1}, "does not understand"),
    ],
)
def test_what_the_config_contradicts_is_refused(name: str, config: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    set_config(tmp_path / "adapter", **config)
    with pytest.raises((AdapterError, MergeError), match=why):
        merge(load_adapter(tmp_path / "adapter"), tmp_path / "merged")


def test_factors_for_inputs_of_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    model_class, model = resnet(tmp_path)
    model.save_pretrained(tmp_path / "base")
    config = {"kind": IA3Config, "target_modules": ["convolution"], "feedforward_modules": ["convolution"]}
    make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=model_class, **config)
    with pytest.raises(AdapterError, match="factors for the inputs of a convolution"):
        load_adapter(tmp_path / "adapter")
    set_config(tmp_path / "adapter", feedforward_modules=None)
    with pytest.raises(AdapterError, match="does not say what feedforward_modules are"):
        load_adapter(tmp_path / "adapter")


def test_a_bias_that_the_class_has_and_the_base_lacks_is_named(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(tmp_path / "adapter", base, **SETTINGS["ia3"])
    (file,) = base.glob("*.safetensors")
    tensors = {name: value for name, value in load_file(file).items() if not name.endswith("k_proj.bias")}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"k_proj\.bias"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_the_record_names_what_was_changed_and_by_what(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(tmp_path / "adapter", base, **SETTINGS["ia3"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    changed = {entry["tensor"] for entry in record["tensors"] if entry.get("action", "merge") == "merge"}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"} <= changed
    assert "model.layers.0.mlp.down_proj.bias" not in changed


@pytest.mark.parametrize("bias", [False, True])
def test_a_graph_gets_the_merged_weights_unless_its_biases_would_change_too(bias: bool, tmp_path: Path) -> None:
    case = make_case(tmp_path, bias=bias)
    config = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["v_proj"])
    live = get_peft_model(copy.deepcopy(case.plain), config).eval()
    for name, parameter in live.named_parameters():
        if "ia3_l" in name:
            parameter.data += torch.randn(parameter.shape) * 0.3
    live.save_pretrained(tmp_path / "ia3")
    graph = make_graph(case, tmp_path / "plain.onnx")
    with pytest.raises(OnnxError, match="is no sum of a few constants"):
        export_onnx(tmp_path / "ia3", tmp_path / "out", base=case.base, mode="tiled", onnx=graph)
    if bias:
        with pytest.raises(OnnxError, match=r"changes .*q_proj\.bias.*, which are no matrices of a graph"):
            export_onnx(tmp_path / "ia3", tmp_path / "out", base=case.base, mode="merged", onnx=graph)
        return
    export_onnx(tmp_path / "ia3", tmp_path / "out", base=case.base, mode="merged", onnx=graph)
    x = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
    with torch.no_grad():
        wanted = live(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(tmp_path / "out" / "plain.onnx", x), wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(run(graph, x) - wanted).max() > 0.1
