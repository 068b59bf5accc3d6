"""LoHa and LoKr are what the live model has, in linear layers and in convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base, weights
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lokr.layer import Conv1d as LoKrConv1d
from peft.tuners.lokr.layer import Conv2d as LoKrConv2d
from peft.tuners.lokr.layer import Linear as LoKrLinear
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, Wav2Vec2Config, Wav2Vec2ForCTC
from tuner_tools import assert_caught, assert_live, assert_rounded, set_config

from fossil_export import FossilExportError, load_adapter, merge, verify
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

SETTINGS: dict[str, dict[str, Any]] = {
    "loha": {"kind": LoHaConfig},
    "loha, alpha that no power of two divides": {"kind": LoHaConfig, "alpha": 7, "r": 3},
    "loha, patterns": {"kind": LoHaConfig, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"0\..*v_proj": 3}},
    "lokr, half decomposed": {"kind": LoKrConfig, "r": 2, "alpha": 5},
    "lokr, both decomposed": {"kind": LoKrConfig, "r": 1, "decompose_both": True, "decompose_factor": 4},
    "lokr, whole": {"kind": LoKrConfig, "r": 64, "decompose_factor": 3},
    "lokr, patterns": {"kind": LoKrConfig, "r": 2, "rank_pattern": {"up_proj": 1}, "alpha_pattern": {"q_proj": 1}},
    "lokr, as LyCORIS begins": {"kind": LoKrConfig, "r": 2, "init_weights": "lycoris"},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_in_float64_the_merged_model_is_the_live_one(name: str, tmp_path: Path) -> None:
    assert_live(make_base(tmp_path / "base", torch.float64), tmp_path, **SETTINGS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_merged_weights_are_the_truth_rounded_once(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    config = {"kind": kind, "r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    assert_rounded(make_base(tmp_path / "base", dtype), tmp_path, dtype, kind is LoHaConfig, **config)
    assert_caught(tmp_path / "merged", "model.layers.0.self_attn.q_proj.weight")


def resnet(folder: Path) -> Any:
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1]))
    model.double().save_pretrained(folder)
    return {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}, ["convolution"]


def wav2vec2(folder: Path) -> Any:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20,
        conv_dim=(16, 24), conv_stride=(4, 2), conv_kernel=(6, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).double().save_pretrained(folder)
    return {"input_values": torch.randn(1, 400, dtype=torch.float64)}, ["conv_layers.0.conv", "conv_layers.1.conv"]


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind, rank", [(LoHaConfig, 3), (LoKrConfig, 2), (LoKrConfig, 16)])
@pytest.mark.parametrize("make, model_class", [(resnet, ResNetForImageClassification), (wav2vec2, Wav2Vec2ForCTC)])
def test_convolutions_in_one_and_two_dimensions_are_as_they_were_trained(
    make: Any, model_class: Any, kind: Any, rank: int, effective: bool, tmp_path: Path
) -> None:
    inputs, targets = make(tmp_path / "base")
    options = {"kind": kind, "r": rank, "use_effective_conv2d": effective, "target_modules": targets}
    live = make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=model_class, **options)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result.plan.count("merge") == len(load_adapter(tmp_path / "adapter").trained) > 1
    models = [model_class.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("base", "merged")]
    with torch.no_grad():
        truth, base, merged = (model.eval()(**inputs).logits for model in (live, *models))
    assert float((truth - base).abs().max()) > 1e-6 > 1e5 * float((truth - merged).abs().max())
    assert verify(tmp_path / "merged", level="weights").parity


def module_of(layer: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What PEFT's layer trained, by role, and the shapes."""
    peft_type = "LOHA" if isinstance(layer, LoHaLinear) else "LOKR"
    roles = METHODS[peft_type.lower()].PEFT[peft_type]
    arrays = {}
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer"):
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
            arrays[roles[name.removesuffix(".default")]] = parameter.data
    return arrays, {role: tuple(array.shape) for role, array in arrays.items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_gives_pefts_update_in_numpy_and_pytorch_in_any_rows(data: st.DataObject) -> None:
    size = st.integers(1, 12)
    outputs, inputs, rank, kernel = (
        data.draw(size),
        data.draw(size),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 3)),
    )
    made = data.draw(st.sampled_from(["loha", "lokr", "conv1d", "conv2d"]))
    layers: dict[str, Any] = {
        "conv1d": torch.nn.Conv1d(inputs, outputs, kernel),
        "conv2d": torch.nn.Conv2d(inputs, outputs, (kernel, 2)),
    }
    base = layers.get(made, torch.nn.Linear(inputs, outputs)).double()
    wrap: Any = {"loha": LoHaLinear, "lokr": LoKrLinear, "conv1d": LoKrConv1d, "conv2d": LoKrConv2d}[made]
    kind: Any = LoHaConfig if made == "loha" else LoKrConfig
    config = kind(r=rank, alpha=5, use_effective_conv2d=data.draw(st.booleans()))
    if kind is LoKrConfig:
        config.decompose_both, config.decompose_factor = (
            data.draw(st.booleans()),
            data.draw(st.sampled_from([-1, 2, 4])),
        )
    layer = wrap(base, "default", config=config, r=rank, alpha=5)
    arrays, shapes = module_of(layer)
    name = "loha" if made == "loha" else "lokr"
    method, exact = METHODS[name], EXACT[name]
    numbers = method.read({"r": rank, "alpha": 5}, "m", shapes, "here")
    assert numbers is not None
    try:
        truth = layer.get_delta_weight("default").detach().reshape(outputs, -1)
    except RuntimeError:  # PyTorch's kron does not take every view of a convolution of rank 1
        assert made == "conv1d"
        reject()
    assert method.mismatch(shapes, numbers, tuple(truth.shape)) is None
    assert method.mismatch(shapes, numbers, (outputs, truth.shape[1] + 1)) is not None
    dimensions = method.dimensions(shapes)
    assert dimensions is None or dimensions == base.weight.dim()
    numpy = {role: array.numpy() for role, array in arrays.items()}
    block = method.block_rows(shapes)
    start = data.draw(st.integers(0, (outputs - 1) // block)) * block
    stop = min(outputs, start + data.draw(st.integers(1, 3)) * block)
    weight = np.random.default_rng(0).standard_normal(truth.shape)
    for kept in (arrays, numpy):
        part = method.part(kept, start, stop)
        like = weight[start:stop] if kept is numpy else torch.from_numpy(weight[start:stop])
        update = np.asarray(method.update(like, part, numbers, 0))
        np.testing.assert_allclose(update, truth[start:stop].numpy(), rtol=1e-12, atol=1e-14)
        if stop - start > 1:
            last = np.asarray(method.update(like[-1:], part, numbers, stop - start - 1))
            np.testing.assert_allclose(last, update[-1:], rtol=1e-12, atol=1e-14)
    checked = np.empty_like(weight[start:stop])
    bound = exact.rebuild(weight[start:stop], exact.part(numpy, start, stop), numbers, checked)
    np.testing.assert_allclose(checked - weight[start:stop], truth[start:stop].numpy(), rtol=1e-11, atol=1e-13)
    assert bound is not None and bound.shape == checked.shape and exact.up(numpy, numbers) is None


def test_two_of_them_are_added_up_at_their_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float64)
    for name, kind in (("loha", LoHaConfig), ("lokr", LoKrConfig)):
        make_adapter(tmp_path / name, base, kind=kind, r=2, target_modules=["q_proj"])
        merge(tmp_path / name, tmp_path / f"{name} alone")
    merge([tmp_path / "loha", tmp_path / "lokr"], tmp_path / "merged", weights=[0.5, -2])
    before, after = weights(base), weights(tmp_path / "merged")
    key = "model.layers.1.self_attn.q_proj.weight"
    parts = [weights(tmp_path / f"{name} alone")[key] - before[key] for name in ("loha", "lokr")]
    assert torch.allclose(after[key], before[key] + 0.5 * parts[0] - 2 * parts[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kind, drop, config, why",
    [
        (LoHaConfig, "q_proj.hada_w2_b", {}, "its B2 is missing"),
        (LoHaConfig, "", {"r": 5}, "rank 2, but the config says r=5"),
        (LoHaConfig, "", {"rank_pattern": {"q_proj": 1.5}}, r"rank 2, but the config says r=1\.5"),
        (LoHaConfig, "", {"alpha": "8"}, "expected a number"),
        (LoHaConfig, "", {"alpha": 1e39}, "overflows float32"),
        (LoHaConfig, "", {"use_rslora": True}, "does not understand"),
        (LoKrConfig, "q_proj.lokr_w2_b", {}, "not all of its W2"),
        (LoKrConfig, "q_proj.lokr_w1", {}, "not all of its W1"),
        (LoKrConfig, "", {"r": 7}, "rank 2, but the config says r=7"),
        (LoKrConfig, "", {"use_upstream": True}, "does not understand"),
    ],
)
def test_what_is_not_whole_or_not_known_is_refused(
    kind: Any, drop: str, config: dict[str, Any], why: str, base: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=kind, r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not (drop and key.endswith(drop))}
    save_file(tensors, file, {"format": "pt"})
    set_config(tmp_path / "adapter", **config)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


def test_rows_of_lokrs_reference_are_those_of_the_whole() -> None:
    random = np.random.default_rng(0)
    arrays = {role: random.standard_normal(shape) for role, shape in (("W1", (6, 2)), ("A2", (4, 2)), ("B2", (2, 5)))}
    weight, whole = random.standard_normal((24, 10)), np.empty((24, 10))
    EXACT["lokr"].rebuild(weight, arrays, {"scale": 2.0}, whole)
    for start, stop in ((0, 8), (8, 24)):
        found = np.empty((stop - start, 10))
        part = EXACT["lokr"].part(arrays, start, stop)
        EXACT["lokr"].rebuild(weight[start:stop], part, {"scale": 2.0}, found)
        assert (found == whole[start:stop]).all()


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_one_made_for_another_shape_is_refused_before_anything_is_written(kind: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, kind=kind, r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key.replace("self_attn.q_proj", "mlp.up_proj"): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    set_config(tmp_path / "adapter", target_modules=["up_proj"])
    with pytest.raises(FossilExportError, match=r"made for 48 outputs, the weight has 96"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


CONFIGS: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "IA3": {"feedforward_modules": ["m"]},
    "OFT": {"oft_block_size": 4, "use_cayley_neumann": False},
    "BOFT": {},
    "HRA": {"r": 2},
    "ROAD": {"group_size": 2},
    "LN_TUNING": {},
}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tensors_of_any_shape_are_taken_or_refused_in_a_line(data: st.DataObject) -> None:
    """Only what `read` takes may reach the rest, and that never fails on a shape."""
    peft_type = data.draw(st.sampled_from(list(CONFIGS)))
    name = data.draw(st.sampled_from([name for name, method in METHODS.items() if peft_type in method.PEFT]))
    method, size = METHODS[name], st.sampled_from([1, 2, 3, 4])
    roles = data.draw(st.sets(st.sampled_from(sorted(set(method.PEFT[peft_type].values()))), min_size=1))
    shapes = {role: tuple(data.draw(st.lists(size, max_size=5))) for role in sorted(roles)}
    module = data.draw(st.sampled_from(["m", "n"]))
    try:
        numbers = method.read(CONFIGS[peft_type], module, shapes, "here")
    except AdapterError as problem:
        assert str(problem).startswith("here") and ";" in str(problem)
        return
    if numbers is not None:
        method.mismatch(shapes, numbers, (4, 4))
        assert method.dimensions(shapes) is None or method.dimensions(shapes) > 0  # type: ignore[operator]
        assert method.block_rows(shapes) > 0
        beside = method.beside(numbers)
        if beside is not None:
            METHODS[beside].mismatch(shapes, numbers, (4, 1))
