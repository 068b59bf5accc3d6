"""Names and rows: what transformers makes of a checkpoint, worked out from names and shapes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sweep import building
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fossil_export import FossilExportError, merge, models, plan_merge
from fossil_export.models import Names, Unknown, _rules, pieces_of
from fossil_export.models._architecture import Rule
from fossil_export.models._rules import Pass, Rules

CONVERTED = [
    "NomicBertModel", "JinaEmbeddingsV3ForMaskedLM", "GteModel", "RadioModel", "Dinov2Model", "MixtralForCausalLM",
    "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "OlmoHybridForCausalLM",
    "KimiLinearForCausalLM", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "ViTForImageClassification", "DPTForDepthEstimation", "GPTNeoXForCausalLM", "MllamaForConditionalGeneration",
    "Sapiens2Model", "HrmTextForCausalLM", "Step3p7Model",
    "Ernie4_5_VLMoeForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_every_parameter_is_found_where_transformers_stores_it(name: str, tmp_path: Path) -> None:
    """Names, rows of fused tensors, permuted rows, stacked experts: each value of the model from its place on disk."""
    base = building.saved(name, tmp_path / "base")
    stored = weights_of(base.folder)
    shapes = {key: tuple(value.shape) for key, value in stored.items()}
    config = json.loads((base.folder / "config.json").read_text())
    for exact in (False, True):
        model = models.architecture(config, name, exact=exact)
        assert model is not None
        names = Names(model, stored)
        assert not names.strangers and not names.twice
        for parameter, value in building.state(base.model).items():
            if parameter in names.whole:
                assert torch.equal(stored[names.whole[parameter]], value), parameter
            elif parameter in names.converted:
                try:
                    found = pieces_of(names.converted[parameter], parameter, shapes, config, model.shapes)
                except Unknown as problem:
                    assert "Transpose" in str(problem) or "Ernie" in name, problem
                    continue
                assert found.shape == tuple(value.shape)
                assert torch.equal(put_together(found, stored), value), parameter
            else:
                assert parameter in base.missing or any(
                    tie.on and parameter in (tie.target, tie.source) for tie in model.ties
                ), parameter


def put_together(found: models.Pieces, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    width = found.shape[-1] if len(found.shape) > 1 else 1
    rows = torch.cat([stored[run.name].reshape(-1, width)[run.first : run.first + run.count] for run in found.runs])
    if found.order is not None:
        rows = rows.view(*found.order, width).transpose(1, 2)
    return rows.reshape(found.shape)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a vision part, as wide as each other, whose layers have some names in common."""
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=False), vision_config=CLIPVisionConfig(**VISION)
    )
    folder = tmp_path_factory.mktemp("llava") / "base"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def trained(tmp_path: Path, base: Path, modules: dict[str, int], **settings: Any) -> tuple[Path, dict[str, float]]:
    """An adapter whose shards, 4 rows of the module's number of outputs, hold one number each: by module."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    numbers = {module: 1.0 + number for number, module in enumerate(modules)}
    shards = {
        f"base_model.model.{module}.miss_block": torch.full((4, outputs), numbers[module])
        for module, outputs in modules.items()
    }
    save_file(shards, folder / "adapter_model.safetensors")
    config = {"peft_type": "MISS", "r": 4, "base_model_name_or_path": str(base), "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder, numbers


LAYER = "layers.1.self_attn.q_proj"
SPELLINGS = {
    "today's": (f"model.language_model.{LAYER}", f"model.vision_tower.encoder.{LAYER}"),
    "before": (f"language_model.model.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_part_gets_its_own_shards(spelling: str, llava: Path, tmp_path: Path) -> None:
    """Both parts have `layers.1.self_attn.q_proj` of one shape; neither is taken for the other."""
    text, vision = SPELLINGS[spelling]
    for modules in ({text: 32}, {vision: 32}, {text: 32, vision: 32}):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        adapter, numbers = trained(tmp_path, llava, modules)
        merge(adapter, tmp_path / "merged", overwrite=True)
        before, after = weights_of(llava), weights_of(tmp_path / "merged")
        for name, value in before.items():
            part = text if "language_model" in name else vision
            number = numbers.get(part, 0.0) if name.endswith(f"{LAYER}.weight") else 0.0
            assert torch.equal(after[name], value + number if number else value), name


def test_a_text_model_alone_is_found_in_one_of_several_parts(llava: Path, tmp_path: Path) -> None:
    adapter, _ = trained(tmp_path, llava, {f"model.{LAYER}": 32, "lm_head": 60})
    changed = {
        change.trained.module: tensor.name for tensor in plan_merge(adapter).tensors for change in tensor.changes
    }
    before = weights_of(llava)
    assert changed[f"model.{LAYER}"] in before and "language_model" in changed[f"model.{LAYER}"]
    assert changed["lm_head"].endswith("lm_head.weight")


@pytest.mark.parametrize("around", ["model.language_model.", "language_model.model."])
def test_a_part_is_found_in_a_text_model_alone(around: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "base")
    adapter, _ = trained(tmp_path, tmp_path / "base", {around + LAYER: 32})
    (tensor,) = [tensor for tensor in plan_merge(adapter).tensors if tensor.changes]
    assert tensor.name == f"model.{LAYER}.weight"


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForCausalLM])
@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_a_model_with_or_without_its_head_s_prefix(kind: Any, task: str, tmp_path: Path) -> None:
    kind(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "base")
    module = LAYER if task == "FEATURE_EXTRACTION" else f"model.{LAYER}"
    adapter, _ = trained(tmp_path, tmp_path / "base", {module: 32}, task_type=task)
    (tensor,) = [tensor for tensor in plan_merge(adapter).tensors if tensor.changes]
    assert tensor.name == (f"{LAYER}.weight" if kind is LlamaModel else f"model.{LAYER}.weight")


def test_saved_modules_replace_the_base_s_whatever_they_are_called(llava: Path, tmp_path: Path) -> None:
    """Before, they landed beside the tensors that they were to replace."""
    target = ["q_proj"]
    model = make_adapter(
        tmp_path / "adapter", llava, model_class=LlavaForConditionalGeneration, r=4, target_modules=target,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = weights_of(llava), weights_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    loaded, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(12).reshape(1, -1)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_unknown_model_takes_plain_names_and_refuses_what_needs_knowledge(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", model_type="of-my-own", architectures=["MyForCausalLM"])
    adapter, _ = trained(tmp_path, tmp_path / "base", {f"model.{LAYER}": 32})
    merge(adapter, tmp_path / "merged")
    shutil.rmtree(adapter)
    adapter, _ = trained(tmp_path, tmp_path / "base", {f"language_model.model.{LAYER}": 32})
    with pytest.raises(FossilExportError, match=r"has no weights for language_model.*install a transformers that"):
        plan_merge(adapter)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(adapter)
    adapter, _ = trained(tmp_path, tmp_path / "base", {"lm_head": 60})
    with pytest.raises(FossilExportError, match=r"whether lm_head.weight, .* is tied to another tensor cannot"):
        plan_merge(adapter)
    with safe_open(next((tmp_path / "base").glob("*.safetensors")), "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118  # no dict


def test_a_name_alone_is_renamed_as_in_a_pass_of_its_own() -> None:
    """A group of renames begins with its first name, also if another one was asked for before."""
    rules = (Rule("GroupWeightRename", (r"^a\.(\w+)$", r"^b\.(\w+)$"), (r"x.\1", r"y.\1"), ((), ())),)
    once = Pass(rules, ["a.weight", "b.weight"])
    assert [one[1] for one in once.renamed] == ["x.weight", "y.weight"]
    for name in ("b.weight", "a.weight", "b.weight", "b.bias"):
        found, converter, _ = Rules(rules).rename(name)
        assert once.alone(name) == (found, converter is not None)
    assert once.alone("b.bias")[0] == "b.bias"


def test_classes_of_the_same_rules_take_one_pass(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of 90,000 tensors tries ten classes; each made the rules again for every name of the adapter."""
    made, passed = [], []
    renamer, alone = _rules._renamer, Pass.__post_init__
    monkeypatch.setattr(_rules, "_renamer", lambda *one: made.append(one) or renamer(*one))
    monkeypatch.setattr(Pass, "__post_init__", lambda self, names: passed.append(self.rules) or alone(self, names))
    adapter, _ = trained(tmp_path, llava, {f"model.{LAYER}": 32, "lm_head": 60})
    plan_merge(adapter)
    assert all(rules not in passed[:at] for at, rules in enumerate(passed))
    assert 0 < len(made) <= sum(len(rules) for rules in passed)
