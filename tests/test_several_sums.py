"""LoRA and other methods added up, held against PEFT with all of them active; and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from several_tools import trained
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, load_adapter, merge, plan_merge
from fossil_export.merging._placement import Placement, together

TOKENS = torch.arange(24).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


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


@pytest.mark.parametrize("order", [1, -1])
def test_the_base_is_that_of_the_only_adapter_that_names_one(order: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = trained(tmp_path / "one", base, 1), trained(tmp_path / "two", base, 2)
    edit_json(two / "adapter_config.json", base_model_name_or_path=None)
    assert plan_merge([one, two][::order]).base.folder == base


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
