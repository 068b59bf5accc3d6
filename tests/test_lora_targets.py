"""A tensor is merged only if the config targets its module, as PEFT matches modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from places_tools import edit_weights
from transformers import AutoModelForCausalLM

from fossil_export import load_adapter, merge
from fossil_export.adapters._targets import is_targeted
from fossil_export.errors import AdapterError, CheckpointError, FossilExportError, MergeError

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.12.self_attn.v_proj",
    "model.layers.1.mlp.experts.0.down_proj", "model.encoder.layer.3.proj", "transformer.h.2.attn.c_attn", "lm_head",
    "model.embed_tokens", "blocks.1.q_proj", "layers.2.q_proj",
]  # fmt: skip
TARGETS = [
    ["q_proj"], ["q_proj", "v_proj", "lm_head"], ["layers.1.self_attn.q_proj"], ["proj"], [], ["down_proj", "c_attn"],
    r".*layers\.1\..*", r"q_proj", r".*\.(q|v)_proj", ["model.layers.0.self_attn.q_proj", "v_proj"],
]  # fmt: skip
EXCLUDED = [None, [], ["lm_head"], ["layers.1.self_attn.q_proj", "v_proj"], r".*\.0\..*", ""]
LAYERS = [None, [], [1], [0, 12], 1, [2, 3]]
PATTERNS = [None, [], "layers", ["h", "layer"], "", ["encoder.layer"], "blocks"]


@given(*(st.sampled_from(given) for given in (NAMES, TARGETS, EXCLUDED, LAYERS, PATTERNS)))
def test_modules_are_matched_as_peft_matches_them(
    name: str, targets: Any, excluded: Any, layers: Any, patterns: Any
) -> None:
    config: dict[str, Any] = {"target_modules": targets, "exclude_modules": excluded}
    if not isinstance(targets, str):
        config |= {"layers_to_transform": layers} | ({"layers_pattern": patterns} if layers else {})
    wanted = bool(check_target_module_exists(LoraConfig(**config), name))
    assert is_targeted(Path("config"), config, name) is wanted


def lora(folder: Path, base: Path, **config: Any) -> Path:
    make_adapter(folder, base, kind=LoraConfig, **config)
    return folder / "adapter_config.json"


@pytest.mark.parametrize(
    "config, edits",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": ["v_proj"]}),
        ({"target_modules": ["q_proj"]}, {"exclude_modules": r".*layers\.1\..*"}),
        ({"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}),
        ({"target_modules": ["q_proj"]}, {"layers_to_transform": 1, "layers_pattern": "layers"}),
        ({"target_modules": ["q_proj"]}, {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]}),
        ({"target_modules": ["q_proj"]}, {"target_modules": []}),
        ({"target_modules": ["q_proj"]}, {"target_modules": "q_proj"}),
        ({"target_modules": ["q_proj"]}, {"target_modules": None, "target_parameters": ["k_proj.weight"]}),
    ],
)
def test_a_module_that_the_config_leaves_out_is_refused(
    config: dict[str, Any], edits: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    path = lora(tmp_path / "lora", base, **config)
    load_adapter(tmp_path / "lora")
    edit_json(path, **edits)
    with pytest.raises(AdapterError, match=r"target_modules does not cover .*_proj"):
        load_adapter(tmp_path / "lora")


@pytest.mark.parametrize(
    "edits, why",
    [
        ({"target_modules": "("}, "target_modules is not a valid regular expression"),
        ({"exclude_modules": "("}, "exclude_modules is not a valid regular expression"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern is not a valid regular expression"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
    ],
)
def test_fields_that_peft_never_writes_are_refused(edits: dict[str, Any], why: str, base: Path, tmp_path: Path) -> None:
    edit_json(lora(tmp_path / "lora", base, target_modules=["q_proj"]), **edits)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "lora")


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR"])
def test_configs_that_leave_the_modules_to_peft_are_taken(targets: Any, base: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "lora", base, target_modules=["q_proj", "up_proj"])
    before = merge(tmp_path / "lora", tmp_path / "one").survival
    edit_json(path, target_modules=targets)
    assert merge(tmp_path / "lora", tmp_path / "two").survival.keys() == before.keys()


def only(part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [one for one in tensors if part in one]:
            value = change(tensors.pop(name))
            if value is not None:
                tensors[name] = value

    return edit


@pytest.mark.parametrize(
    "edit, why",
    [
        (only("layers.0.self_attn.q_proj.lora_A", lambda value: None), "lora_A is missing"),
        (only("layers.1.self_attn.q_proj.lora_B", lambda value: None), "lora_B is missing"),
        (only("layers.0.self_attn.q_proj.lora_B", lambda value: value * float("nan")), "training diverged"),
        (only("layers.0.self_attn.q_proj.lora_A", lambda value: value / 0), "training diverged"),
        (
            only("layers.0.self_attn.q_proj.lora_A", lambda value: value[:, :40]),
            "made for 40 inputs, the weight has 48",
        ),
        (only("layers.0.self_attn.q_proj.lora_B", lambda value: value[:40]), "made for 40 outputs, the weight has 48"),
        (only("layers.0.self_attn.q_proj.lora_A", lambda value: value[:4]), "do not go together"),
        (only("layers.0.self_attn.q_proj.lora_A", lambda value: value[:0]), "is empty"),
        (only("layers.0.self_attn.q_proj.lora_B", lambda value: value.to(torch.int8)), "is I8"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(edit: Any, why: str, base: Path, tmp_path: Path) -> None:
    lora(tmp_path / "lora", base, target_modules=["q_proj"])
    edit_weights(tmp_path / "lora", edit)
    with pytest.raises(FossilExportError, match=why) as problem:
        merge(tmp_path / "lora", tmp_path / "merged")
    assert "\n" not in str(problem.value) and not (tmp_path / "merged").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    lora(tmp_path / "lora", base, target_modules=["q_proj"])

    def more(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.1.", "layers.7.")] = tensors[name]

    edit_weights(tmp_path / "lora", more)
    with pytest.raises(MergeError, match=r"has no weights for model\.layers\.7\.self_attn\.q_proj"):
        merge(tmp_path / "lora", tmp_path / "merged")


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards="1GB")
    lora(tmp_path / "lora", base, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors.pop(f"{name}.weight")
        tensors[f"{name}.qweight"] = weight.to(torch.int32)
        tensors[f"{name}.scales"] = weight[:1].half()

    edit_weights(base, quantize)
    with pytest.raises(CheckpointError, match="quantized"):
        merge(tmp_path / "lora", tmp_path / "merged")

    def code(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"] = tensors.pop(f"{name}.qweight").char()

    edit_weights(base, code)
    with pytest.raises(MergeError, match="quantized"):
        merge(tmp_path / "lora", tmp_path / "merged")


@pytest.mark.parametrize("kind, alpha", [(LoraConfig, "lora_alpha"), (LoHaConfig, "alpha")])
def test_two_alphas_for_a_module_are_refused_because_peft_sorts_them(
    kind: Any, alpha: str, base: Path, tmp_path: Path
) -> None:
    """The live model has the first alpha; PEFT itself takes the other one out of the file that it saved."""
    pattern = {"q_proj": 3, r"layers\.1\..*": 5}
    make_adapter(tmp_path / "adapter", base, kind=kind, target_modules=QV, alpha_pattern=pattern, **{alpha: 8})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert list(config["alpha_pattern"]) != list(pattern)
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj.*alpha_pattern has several values .*: 5.*: 3"):
        load_adapter(tmp_path / "adapter")
    pattern = {"q_proj": 5, r"layers\.1\..*": 5}
    make_adapter(tmp_path / "other", base, kind=kind, target_modules=QV, alpha_pattern=pattern, **{alpha: 8})
    scales = [one.numbers["scale"] for one in load_adapter(tmp_path / "other").trained.values()]
    assert sorted(scales) == [5 / 8, 5 / 8, 5 / 8, 1]


@pytest.mark.parametrize(
    "config, lost, why",
    [
        ({"modules_to_save": ["norm"]}, "layers.1.input_layernorm", r"model.layers.1.input_layernorm.weight were"),
        ({"modules_to_save": ["lm_head", "o_proj"]}, "lm_head", r"lm_head.weight were"),
        ({"trainable_token_indices": [3, 4]}, "embed_tokens", r"rows of tokens were trained"),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}},
            "lm_head",
            r"rows of tokens were trained",
        ),
    ],
)
def test_what_the_config_says_was_trained_must_be_there(
    config: dict[str, Any], lost: str, why: str, base: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"], **config)
    merge(tmp_path / "adapter", tmp_path / "merged")
    edit_weights(tmp_path / "adapter", lambda found: [found.pop(name) for name in list(found) if lost in name])
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with pytest.raises(MergeError, match=why):
        merge(tmp_path / "adapter", tmp_path / "other", base=base)


@pytest.mark.parametrize(
    "extra, with_transformers",
    [
        ("model.layers.2.mlp.up_proj.weight", True),
        ("model.layers.7.input_layernorm.weight", False),
        ("model.layers.1.mlp.up_proj.bias", True),  # the table alone does not know which layers have one
    ],
)
def test_a_saved_tensor_that_the_model_has_no_place_for_is_refused(
    extra: str, with_transformers: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj"])
    edit_weights(tmp_path / "adapter", lambda found: found.update({f"base_model.model.{extra}": torch.ones(96, 48)}))
    if not with_transformers:
        monkeypatch.setattr("fossil_export.merging._place.exact_names", lambda *given: None)
    with pytest.raises(MergeError, match=rf"saved tensor .*{extra} has no counterpart"):
        merge(tmp_path / "adapter", tmp_path / "merged")
