"""OFT, BOFT and HRA are what the live model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from conftest import make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel
from peft.tuners.hra.layer import HRALinear
from peft.tuners.oft.layer import Embedding as OFTEmbedding
from peft.tuners.oft.layer import Linear as OFTLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification
from tuner_tools import assert_caught, assert_live, assert_rounded, biased_base, logits, set_config

from fossil_export import load_adapter, merge
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

BY_EIGHT = {"kind": OFTConfig, "r": 0, "oft_block_size": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "oft": BY_EIGHT,
    "oft, as many blocks": {"kind": OFTConfig, "r": 4, "oft_block_size": 0, "module_dropout": 0.1},
    "oft, Cayley": BY_EIGHT | {"use_cayley_neumann": False},
    "oft, a size that divides nothing, shared": BY_EIGHT | {"oft_block_size": 7, "block_share": True},
    "oft, constrained": BY_EIGHT | {"coft": True, "eps": 0.4, "num_cayley_neumann_terms": 7},
    "oft, embedding": BY_EIGHT | {"target_modules": ["embed_tokens", "q_proj"]},
    "oft, biases": BY_EIGHT | {"bias": "oft_only"},
    "boft": {"kind": BOFTConfig},
    "boft, as many blocks": {"kind": BOFTConfig, "boft_block_size": 0, "boft_block_num": 2, "boft_dropout": 0.1},
    "hra": {"kind": HRAConfig},
    "hra, an odd rank": {"kind": HRAConfig, "r": 5, "init_weights": False},
    "hra, orthogonal": {"kind": HRAConfig, "apply_GS": True, "init_weights": False},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_in_float64_the_merged_model_is_the_live_one(name: str, tmp_path: Path) -> None:
    assert_live(biased_base(tmp_path / "base", torch.float64), tmp_path, **SETTINGS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["oft", "oft, Cayley", "boft", "hra"])
def test_merged_weights_are_the_truth_rounded_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_rounded(biased_base(tmp_path / "base", dtype), tmp_path, dtype, **SETTINGS[name])
    assert_caught(tmp_path / "merged", "model.layers.1.self_attn.v_proj.weight", steps=64)


class PlainBlocks:
    """What BOFT's CUDA extension computes, which is on no CPU."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*one) for one in blocks])


@pytest.mark.parametrize("factor, size", [(2, 4), (3, 2), (3, 4)])
def test_butterflies_are_those_of_the_extension(
    factor: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", PlainBlocks)
    config = {"kind": BOFTConfig, "boft_n_butterfly_factor": factor, "boft_block_size": size}
    base = biased_base(tmp_path / "base", torch.float64)
    assert_live(base, tmp_path, **config)
    assert load_adapter(tmp_path / "adapter").trained["model.layers.0.mlp.up_proj"].shapes["X"][0] == factor
    set_config(tmp_path / "adapter", boft_n_butterfly_factor=factor + 1)
    with pytest.raises(AdapterError, match=f"{factor} factors, but the config says"):
        load_adapter(tmp_path / "adapter")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_gives_pefts_layer_in_numpy_and_pytorch_in_any_rows(data: st.DataObject) -> None:
    size, blocks, outputs = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    inputs, made = size * blocks, data.draw(st.sampled_from(["oft", "oft_embedding", "hra"]))
    if made == "hra":
        rank = data.draw(st.integers(1, min(4, inputs)))
        config: Any = HRAConfig(r=rank, apply_GS=data.draw(st.booleans()), init_weights=False)
        layer: Any = HRALinear(torch.nn.Linear(inputs, outputs, bias=False).double(), "default", config=config, r=rank)
        arrays = {"u": layer.hra_u["default"].data}
    else:
        config = OFTConfig(
            r=0, oft_block_size=size, block_share=data.draw(st.booleans()), coft=data.draw(st.booleans()),
            eps=data.draw(st.sampled_from([6e-5, 0.3])), use_cayley_neumann=data.draw(st.booleans()),
            num_cayley_neumann_terms=data.draw(st.integers(0, 7)), init_weights=False,
        )  # fmt: skip
        if made == "oft":
            layer = OFTLinear(torch.nn.Linear(inputs, outputs, bias=False).double(), "default", config=config, r=0)
        else:
            layer = OFTEmbedding(torch.nn.Embedding(outputs, inputs).double(), "default", config=config, r=0)
        turns = layer.oft_R if made == "oft" else layer.oft_embedding_R
        arrays = {"Q": turns["default"].weight.data}
    stored = {role: array.clone() for role, array in arrays.items()}
    with torch.no_grad():
        if made == "oft_embedding":
            truth = layer(torch.arange(outputs)).numpy()
        else:
            truth = layer(torch.eye(inputs, dtype=torch.float64)).T.numpy()
    method, exact = METHODS[made], EXACT[made]
    shapes = {role: tuple(array.shape) for role, array in stored.items()}
    numbers = method.read(config.to_dict(), "m", shapes, "here")
    assert numbers is not None and method.mismatch(shapes, numbers, (outputs, inputs)) is None
    assert method.mismatch(shapes, numbers, (outputs, inputs + 1)) is not None
    start = data.draw(st.integers(0, outputs - 1))
    stop = data.draw(st.integers(start + 1, outputs))
    weight = layer.get_base_layer().weight.detach()[start:stop]
    for into in (torch.clone, lambda array: array.numpy().copy()):
        part = method.part({role: into(array) for role, array in stored.items()}, start, stop)
        rows = into(weight)
        update = method.update(rows, part, numbers, 0)
        method.add(rows, part, numbers, 0)
        np.testing.assert_allclose(np.asarray(rows), truth[start:stop], rtol=0, atol=1e-11)
        np.testing.assert_allclose(np.asarray(update), truth[start:stop] - weight.numpy(), rtol=0, atol=1e-11)
    checked = np.empty((stop - start, inputs))
    part = exact.part({role: array.numpy() for role, array in stored.items()}, start, stop)
    assert exact.rebuild(weight.numpy(), part, numbers, checked) is not None
    np.testing.assert_allclose(checked, truth[start:stop], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["boft", "hra"])
def test_several_follow_one_another_as_in_the_live_model(name: str, tmp_path: Path) -> None:
    base, live = biased_base(tmp_path / "base", torch.float64), several(tmp_path, name)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    truth = logits(live)
    assert torch.allclose(logits(merged), truth, rtol=0, atol=1e-11 * float(truth.abs().max())), base


def test_several_of_oft_are_refused_since_pefts_merge_is_not_its_live_model(tmp_path: Path) -> None:
    biased_base(tmp_path / "base", torch.float64)
    live = several(tmp_path, "oft")
    truth = logits(live)
    assert not torch.allclose(logits(live.merge_and_unload(adapter_names=["0", "1"])), truth, rtol=1e-6)
    with pytest.raises(MergeError, match="such adapters cannot be added up"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")


def several(folder: Path, name: str) -> PeftModel:
    """The live model of two adapters, both active, in the folders 0 and 1."""
    for number in range(2):

        def change(model: torch.nn.Module, seed: int = number) -> None:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape) * 0.2

        make_adapter(folder / f"{number}", folder / "base", change, **SETTINGS[name])
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    live = PeftModel.from_pretrained(model, folder / "0", adapter_name="0")
    live.load_adapter(folder / "1", adapter_name="1")
    live.base_model.set_adapter(["0", "1"])
    return live.eval()


@pytest.mark.parametrize(
    "name, config, why",
    [
        ("oft", {"oft_block_size": ...}, "of an older OFT"),
        ("oft", {"use_cayley_neumann": ...}, "of an older OFT"),
        ("oft", {"peft_version": "0.17.1"}, "use_cayley_neumann meant something else before PEFT 0.18"),
        ("oft", {"peft_version": ...}, "use_cayley_neumann meant something else before PEFT 0.18"),
        ("oft", {"block_share": True}, "has 8 blocks, but the config says block_share"),
        ("oft", {"num_cayley_neumann_terms": -1}, "expected an integer that is not negative"),
        ("oft", {"eps": "tiny"}, "expected a number"),
        ("oft", {"use_givens": True}, "does not understand"),
        ("hra", {"r": 3}, "does not go with r=3"),
        ("boft", {"boft_n_butterfly_factor": 0}, "expected a positive integer"),
    ],
)
def test_what_the_config_contradicts_is_refused(name: str, config: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    set_config(tmp_path / "adapter", **config)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


def test_without_the_series_no_version_is_needed(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS["oft, Cayley"])
    set_config(tmp_path / "adapter", peft_version=...)
    assert load_adapter(tmp_path / "adapter").variant == "oft"


@pytest.mark.parametrize("ending", ["oft_r", "oft_R", "oft_s"])
def test_older_oft_is_refused_by_name(ending: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS["oft"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {key.replace("oft_R.weight", ending): torch.zeros(6, 8, 8) for key in load_file(file)}, file, {"format": "pt"}
    )
    with pytest.raises(AdapterError, match="is of an older OFT, which PEFT computed in other ways"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "config", [BY_EIGHT, {"kind": HRAConfig, "r": 2}, {"kind": BOFTConfig, "boft_block_num": 1, "boft_block_size": 0}]
)
def test_convolutions_are_refused_by_name(config: dict[str, Any], tmp_path: Path) -> None:
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "base")
    options = {**config, "target_modules": ["convolution"], "model_class": ResNetForImageClassification}
    make_adapter(tmp_path / "adapter", tmp_path / "base", **options)
    with pytest.raises((AdapterError, MergeError), match="of a convolution"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_mirrors_that_depend_on_one_another_have_no_direction(tmp_path: Path) -> None:
    """HRA begins with pairs of equal columns; made orthogonal, what is left of the second is rounding."""
    base = biased_base(tmp_path / "base")
    config = {"kind": HRAConfig, "apply_GS": True, "target_modules": ["q_proj"]}
    make_adapter(tmp_path / "adapter", base, lambda model: None, **config)
    with pytest.raises(MergeError, match="take an earlier adapter"):
        merge(tmp_path / "adapter", tmp_path / "merged")
