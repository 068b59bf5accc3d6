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
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from several_tools import trained
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, merge, plan_merge, push, verify
from fossil_export.merging._placement import Placement, together

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
    merge([first, second], tmp_path / "merged")
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


LORA: dict[str, Any] = {"kind": LoraConfig}
SECOND: dict[str, Any] = LORA | {
    "r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "lm_head"],
}  # fmt: skip


def live(base: Path, *adapters: Path, dtype: torch.dtype = torch.float64) -> Any:
    """PEFT's model with all adapters active, and all that is in them in `dtype`."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model.to(dtype).eval()


@settings(max_examples=5, deadline=None)
@given(scales=st.lists(st.floats(-3, 3).filter(lambda value: abs(value) > 0.01), min_size=2, max_size=2))
def test_lora_at_weights_is_the_live_model_with_its_scales_set(
    scales: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scales")
    base = make_base(folder / "base")
    adapters = [trained(folder / str(n), base, n, **kind) for n, kind in enumerate([LORA, SECOND])]
    merge(list(zip(adapters, scales, strict=True)), folder / "merged", dtype="float64")
    model = live(base, *adapters)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            for number, scale in enumerate(scales):
                module.set_scale(str(number), scale)
    ours = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float64)
    # The weights are float32, in which the updates are added.
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def test_lora_of_weight_one_is_what_peft_merges_to_the_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [trained(tmp_path / str(n), base, n, **kind) for n, kind in enumerate([LORA, SECOND])]
    merge(adapters, tmp_path / "merged")
    model = live(base, *adapters, dtype=torch.float32)
    wanted = model.merge_and_unload(adapter_names=["0", "1"]).state_dict()
    ours = weights(tmp_path / "merged")
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


@pytest.mark.parametrize("order", [1, -1])
def test_methods_mix_on_one_weight(order: int, tmp_path: Path) -> None:
    """LoRA and MISS together are the base, the one's update and the other's, by hand in float64."""
    base = make_base(tmp_path / "base")
    first, second = trained(tmp_path / "lora", base, 1, **LORA), trained(tmp_path / "miss", base, 2, r=7)
    merge([(first, 0.5), (second, -2.0)][::order], tmp_path / "merged")
    found, plain, lora, miss = (weights(folder) for folder in (tmp_path / "merged", base, first, second))
    for name in found:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        want = plain[name].double()
        if f"{module}.miss_block" in miss:
            product = lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()
            columns = torch.arange(want.shape[1]) % 7
            want = want + 0.5 * product - 2 * miss[f"{module}.miss_block"].double()[columns].T
        torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-6)


def test_pairs_are_adapters_with_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = trained(tmp_path / "one", base, 1), trained(tmp_path / "two", base, 2)
    for several in ([(one, 2.0), two], [(load_adapter(one), np.float32(2)), (str(two), 1)], ((one, 2), two)):
        plan = plan_merge(several)
        assert plan.weights == (2.0, 1.0) and [entry.path.name for entry in plan.adapters] == ["one", "two"]
    assert plan_merge((one, 0.5)).weights == (0.5,) and plan_merge((one, two)).weights == (1.0, 1.0)
    with pytest.raises(FossilExportError, match="both with the adapters and as weights="):
        plan_merge([(one, 2.0), two], weights=[1, 1])
    for wrong in (float("inf"), [1]):
        with pytest.raises(FossilExportError, match="expected a finite number for each of 2 adapters"):
            plan_merge([(one, wrong), two])  # type: ignore[list-item]


def test_what_may_be_a_slip_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = trained(tmp_path / "one", base, 1), trained(tmp_path / "two", base, 2)
    assert plan_merge([one, two]).warnings == ()
    assert plan_merge([one, two, one]).warnings == (f"{one}: is given 2 times, and its updates are added 2 times",)
    (said,) = plan_merge([one, (two, 0)]).warnings
    assert said == f"{two}: its weight is 0, so that nothing of its updates is in the merged model"
    merge([one, (two, 0)], tmp_path / "merged")
    merge(one, tmp_path / "alone")
    alone = weights(tmp_path / "alone")
    assert all(torch.equal(value, alone[name]) for name, value in weights(tmp_path / "merged").items())
    merge([one, one], tmp_path / "twice")
    merge((one, 2.0), tmp_path / "double")
    double = weights(tmp_path / "double")
    for name, value in weights(tmp_path / "twice").items():
        torch.testing.assert_close(value, double[name], rtol=1e-6, atol=1e-6)
    edit_json(two / "adapter_config.json", base_model_name_or_path="ada/other")
    (said,) = plan_merge([one, two], base).warnings
    assert "were trained on different bases" in said and "ada/other" in said


def test_an_update_that_is_for_the_base_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fossil_export.methods import METHODS

    base = make_base(tmp_path / "base")
    one, two = trained(tmp_path / "one", base, 1, **LORA), trained(tmp_path / "two", base, 2)
    elsewhere = trained(tmp_path / "elsewhere", base, 2, target_modules=["lm_head"])
    monkeypatch.setattr(type(METHODS["lora"]), "COMBINES", "alone")
    for several in ([one, two], [two, one]):
        with pytest.raises(
            FossilExportError, match=r"one: its update of .* \(lora\) is for the base's own weight, which"
        ):
            plan_merge(several)
    with pytest.raises(FossilExportError, match=r"one: its updates \(lora\) depend on the weights, .* taken 2 times"):
        plan_merge((one, 2.0))
    assert plan_merge([one, elsewhere]).count("merge") == 15


def test_vocabularies_of_different_sizes_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    sizes = [trained(tmp_path / str(size), base, 1, resize=size) for size in (128, 136)]
    with pytest.raises(FossilExportError, match=r"as a whole, which .* trained too; .*merge one of them"):
        plan_merge(sizes)
    adapters = [load_adapter(path) for path in sizes]
    placements = [Placement(vocab_size=size) for size in (128, 136)]  # in tensors that do not meet
    with pytest.raises(FossilExportError, match=r"different sizes \(.*128: 128, .*136: 136\); merge one of them"):
        together(adapters, placements, [1.0, 1.0])


def test_an_embedding_that_peft_saved_beside_lora_says_how_to_leave_it_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    one, two = (trained(tmp_path / str(n), base, n, True, **LORA, **targets) for n in (1, 2))
    for several in ([one, two], [(one, 0.5)]):
        with pytest.raises(FossilExportError, match="save_embedding_layers=False"):
            plan_merge(several)


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
    assert "| Adapter | [ada/adapter](https://huggingface.co/ada/adapter/tree/" in card and "at weight 1)" in card
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
