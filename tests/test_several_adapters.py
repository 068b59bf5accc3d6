"""Several adapters in one merge: the model with all of them active in PEFT is what must come out."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_base, weights
from loopback import LoopbackHub
from peft import PeftModel
from safetensors.torch import load_file, save_file
from several_tools import trained
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, merge, plan_merge, push, verify

TOKENS = torch.arange(24).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("init", [True, "mini", "bat"])
def test_two_adapters_are_the_model_with_both_active(init: object, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    mini = {"mini_r": 8} if init == "mini" else {}
    first = trained(tmp_path / "first", base, 1, init_weights=init, r=8, **mini)
    second = trained(tmp_path / "second", base, 2, init_weights=init, r=4, target_modules=["q_proj", "up_proj"], **mini)
    result = merge([first, second], tmp_path / "merged")
    assert [found.survived for found in result.survival.values()] == pytest.approx([1.0] * 14, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name="one")
        live.load_adapter(second, adapter_name="two")
    live.base_model.set_adapter(["one", "two"])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(ours), logits(live.eval()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_weights_scale_each_update(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first, second = (trained(tmp_path / name, base, seed, r=4) for seed, name in enumerate(["first", "second"]))
    result = merge([first, second], tmp_path / "merged", weights=[0.5, -2.0])
    merge(first, tmp_path / "one")
    merge(second, tmp_path / "two")
    plain, one, two, both = (weights(tmp_path / name) for name in ("base", "one", "two", "merged"))
    name = "model.layers.1.mlp.down_proj.weight"
    want = plain[name] + 0.5 * (one[name] - plain[name]) - 2 * (two[name] - plain[name])
    torch.testing.assert_close(both[name], want, rtol=1e-5, atol=1e-6)
    assert result.survival[name].survived == pytest.approx(1.0, abs=1e-4)
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [0.5, -2.0] and "adapter" not in record
    assert [change["module"] for change in record["tensors"][0]["changes"]] == [record["tensors"][0]["tensor"][:-7]] * 2
    assert result.plan.to_dict()["adapters"][1]["weight"] == -2.0
    half = merge(first, tmp_path / "half", weights=[0.5])
    record = json.loads((tmp_path / "half" / "fossil_export.json").read_text())
    assert record["adapter"]["weight"] == half.plan.to_dict()["adapter"]["weight"] == 0.5
    for folder in ("merged", "half"):
        assert verify(tmp_path / folder, level="weights").parity


def test_one_adapter_of_weight_one_is_the_simple_case(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first = trained(tmp_path / "first", base, 1)
    merge(first, tmp_path / "plain")
    merge([first], tmp_path / "listed", weights=[1.0])
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "listed" / file.name).read_bytes()


def test_what_cannot_be_added_up_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    plain = trained(tmp_path / "plain", base, 1)
    saved = trained(tmp_path / "saved", base, 2, modules_to_save=["lm_head"])
    head = trained(tmp_path / "head", base, 3, target_modules=["lm_head"])
    with pytest.raises(FossilExportError, match=r"saved: holds lm_head\.weight as a whole, which .*head trained too"):
        plan_merge([saved, head])
    with pytest.raises(FossilExportError, match=r"cannot be taken 0\.5 times"):
        plan_merge([plain, saved], weights=[1, 0.5])
    for numbers in ([1.0], [1.0, float("nan")], [1.0, 10**400], [1.0, "two"]):
        with pytest.raises(FossilExportError, match="expected a finite number for each of 2 adapters"):
            plan_merge([plain, head], weights=numbers)  # type: ignore[arg-type]
    with pytest.raises(FossilExportError, match="no adapter"):
        plan_merge([])
    plan = plan_merge([plain, load_adapter(head)])
    with pytest.raises(FossilExportError, match="adds 2 adapters, and this takes one"):
        _ = plan.adapter
    for folder in (plain, head):
        edit_json(folder / "adapter_config.json", base_model_name_or_path="ada/base", revision=folder.name)
    with pytest.raises(FossilExportError, match=r"different revisions of ada/base \(plain, head\).*--base"):
        plan_merge([plain, head])
    plan_merge([plain, head], base)
    edit_json(plain / "adapter_config.json", base_model_name_or_path=str(base))
    other = make_base(tmp_path / "other")
    with pytest.raises(FossilExportError, match=r"name different bases .*--base"):
        plan_merge([plain, trained(tmp_path / "elsewhere", other, 1)])


def with_whole(folder: Path, base: Path, seed: int, name: str, **config: object) -> torch.Tensor:
    """An adapter that also has a random matrix of the vocabulary's size as the whole tensor `name`."""
    trained(folder, base, seed, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    whole = torch.randn(120, 48, generator=torch.Generator().manual_seed(seed))
    save_file(load_file(file) | {f"base_model.model.{name}": whole}, file, {"format": "pt"})
    edit_json(folder / "adapter_config.json", modules_to_save=[name.split(".")[-2]], **config)
    return whole


@pytest.mark.parametrize("order", [1, -1])
def test_a_trained_head_beside_a_trained_embedding(order: int, tmp_path: Path) -> None:
    """Each parts the two; the one that trained the embedding alone has no head to bring."""
    base = make_base(tmp_path / "base", tie=True)
    embedding = with_whole(tmp_path / "one", base, 1, "model.embed_tokens.weight")
    head = with_whole(tmp_path / "two", base, 2, "lm_head.weight")
    merge([tmp_path / "one", tmp_path / "two"][::order], tmp_path / "merged")
    found = weights(tmp_path / "merged")
    assert torch.equal(found["model.embed_tokens.weight"], embedding) and torch.equal(found["lm_head.weight"], head)


@pytest.mark.parametrize("order", [1, -1])
def test_the_class_is_that_of_the_classifier(order: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trained(tmp_path / "plain", base, 1, task_type="CAUSAL_LM")
    with_whole(tmp_path / "labels", base, 2, "score.weight", task_type="SEQ_CLS")
    merge([tmp_path / "plain", tmp_path / "labels"][::order], tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 120


def test_the_tokenizer_is_that_of_the_resized_vocabulary(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trained(tmp_path / "plain", base, 1)
    trained(tmp_path / "resized", base, 2, resize=128)
    for name in ("plain", "resized"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"version": name}))
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    plan = plan_merge([tmp_path / "plain", tmp_path / "resized"])
    assert plan.companions["tokenizer.json"].parent.name == "resized"
    assert any("resized: its tokenizer is taken; " in line and line.count("plain") == 1 for line in plan.warnings)
    (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps({"version": "resized"}))
    assert not plan_merge([tmp_path / "plain", tmp_path / "resized"]).warnings


def test_weights_of_any_kind_of_number(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = make_base(tmp_path / "base")
    adapters = [trained(tmp_path / name, base, seed) for seed, name in enumerate(["first", "second"])]
    merge(adapters, tmp_path / "merged", weights=[np.float32(0.5), 2])
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [0.5, 2.0]
    nothing = merge(adapters, tmp_path / "nothing", weights=[0, 0])
    assert nothing.warnings == ("every weight is 0: the merged model is the base",)
    with pytest.raises(FossilExportError, match=r"weight: overflows float32; give .* smaller weights"):
        merge(adapters, tmp_path / "huge", weights=[1e39, 1])
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_the_card_of_several_and_no_path_of_theirs(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    private = shutil.copytree(models / "adapter", tmp_path / "private" / "secret-name")
    merge(["ada/adapter", private], tmp_path / "merged", base="ada/base", weights=[1.0, 0.5])
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    for entry in record["adapters"][1:]:
        entry["name"] = entry["base_model"] = "/srv/private/secret-name"  # in no folder that is known
    (tmp_path / "merged" / "fossil_export.json").write_text(json.dumps(record))
    result = push(tmp_path / "merged", "ada/new")
    assert any("first and the card will quote it" in line for line in result.warnings)
    for name in hosted.files("ada/new"):
        assert b"/srv/private" not in hosted.read("ada/new", name), name
    card = hosted.read("ada/new", "README.md").decode()
    assert "the sum of 2 adapters is merged into its weights" in card
    assert f"| Adapter | [ada/adapter]({hosted.endpoint}/ada/adapter/tree/" in card and "at weight 1)" in card
    assert "| Adapter | not on the Hub (tile, at weight 0.5) |" in card and "- tile\n" in card


def test_the_card_of_one_at_a_weight(hosted: LoopbackHub, tmp_path: Path) -> None:
    merge("ada/adapter", tmp_path / "merged", weights=[0.5])
    push(tmp_path / "merged", "ada/new")
    assert "| Weight of the update | 0.5 |" in hosted.read("ada/new", "README.md").decode()


@pytest.mark.parametrize("junk", [3, "x", None, [3], {"weight": 2}])
def test_verify_reads_any_record(junk: object, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    edit_json(tmp_path / "merged" / "fossil_export.json", tensors=junk)
    assert verify(tmp_path / "merged", level="weights").parity


def test_exits_that_take_one_adapter_say_so() -> None:
    several: Any = ["one", "two"]
    for run in (lambda: convert(several, "out", to="lora"), lambda: export_onnx(several, "out")):
        with pytest.raises(FossilExportError, match="list: is no path or id of an adapter; name one"):
            run()
