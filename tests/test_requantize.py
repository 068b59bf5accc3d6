"""Merges that keep the base's quantization: against the formats' own libraries, and what verify says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requantize_tools
import torch
from conftest import edit_json
from peft import LoraConfig, PeftModel
from quantized_bnb import Tensors
from quantized_kept import CASES, Case
from quantized_mxfp4 import trained
from requantize_tools import WEIGHTS, merge, verified
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fossil_export
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints._source import by_path
from fossil_export.errors import MergeError
from fossil_export.verifying._files import Files

made = requantize_tools.made


def touched(case: Case) -> dict[str, TensorInfo]:
    """The quantized weights that the adapter changes."""
    base = open_checkpoint(case.quantized)
    plan = fossil_export.plan_merge(case.adapter, case.quantized)
    return {one.name: base.tensors[one.name] for one in plan.tensors if one.changes and base.tensors[one.name].coding}


def stored_of(info: TensorInfo) -> list[str]:
    assert info.coding is not None
    return [one.name for one in info.coding.stored]


def codes_of(info: TensorInfo) -> str:
    return stored_of(info)[0]


def merged_by_peft(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(case.dequantized, dtype=dtype)
    return PeftModel.from_pretrained(model, str(case.adapter)).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", list(CASES))
def test_all_but_the_merged_weights_is_the_bases_byte_for_byte(name: str, made: Any) -> None:
    case, merged = made(name)
    changed = {one for info in touched(case).values() for one in stored_of(info)}
    assert changed
    plan = fossil_export.plan_merge(case.adapter, case.quantized)
    changed |= {one.name for one in plan.tensors if one.changes and not plan.base.tensors[one.name].coding}
    before, after = load_file(case.quantized / WEIGHTS), load_file(merged / WEIGHTS)
    assert list(before) == list(after)
    for one, value in before.items():
        same = torch.equal(after[one].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        assert same or one in changed, one
    assert all(not torch.equal(after[one], before[one]) for one in map(codes_of, touched(case).values()))
    size = 8 + int.from_bytes((case.quantized / WEIGHTS).read_bytes()[:8], "little")
    assert (case.quantized / WEIGHTS).read_bytes()[:size] == (merged / WEIGHTS).read_bytes()[:size]
    assert (case.quantized / "config.json").read_bytes() == (merged / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8", "packed", "channels"])
def test_merged_weights_are_what_the_library_makes_of_them(name: str, made: Any) -> None:
    case, merged = made(name)
    before, after, wanted = load_file(case.quantized / WEIGHTS), load_file(merged / WEIGHTS), merged_by_peft(case)
    different = total = 0
    for weight, info in touched(case).items():
        for one, value in case.requantized(weight, wanted[weight], before).items():
            if one in stored_of(info) and value.ndim and "quant_state" not in one:
                # PEFT adds in another order: scales may differ in the last bit, and so may codes between two.
                different += int((after[one].view(torch.uint8) != value.contiguous().view(torch.uint8)).sum())
                total += value.nbytes if value.dtype != torch.float32 else 0
                if value.is_floating_point():
                    assert torch.allclose(after[one].float(), value.float(), rtol=1e-6 if value.nbytes > 1 else 0.1)
    assert total > 300_000 / 4 and different < 2e-3 * total


@pytest.mark.parametrize("name", list(CASES))
def test_verify_finds_the_weights_right_and_says_that_it_is_another_model(name: str, made: Any) -> None:
    case, merged = made(name)
    found = verified(case, merged)
    assert found.parity, found.problems
    assert found.verdict == "quantized again as it must be; its answers were not compared"
    assert any("quantized again" in line for line in found.warnings)
    certificate = json.loads((merged / "fossil_parity.json").read_text())
    record = json.loads((merged / "fossil_export.json").read_text())
    assert certificate["requantized"] == record["quantization"]["base"] and record["quantization"]["kept"]
    assert certificate["weights"]["requantized"] == len(touched(case))
    assert certificate["weights"]["update_survived"] == pytest.approx(record["survival"]["survived"], rel=0.02)


def rewritten(case: Case, merged: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(merged, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def flipped(value: torch.Tensor, at: int, mask: int) -> torch.Tensor:
    found = value.clone().contiguous()
    found.reshape(-1).view(torch.uint8)[at] ^= mask
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_one_code_that_is_the_next_one_is_seen(name: str, made: Any, tmp_path: Path) -> None:
    case, merged = made(name)
    weight, info = next(iter(touched(case).items()))
    codes = codes_of(info)
    # The lowest bit of a code: a value that is one step off.
    folder = rewritten(case, merged, tmp_path / "off", lambda one: one.update({codes: flipped(one[codes], 40, 1)}))
    found = verified(case, folder)
    assert not found.parity and f"{weight} 1 of" in found.problems[0], found.problems
    assert "are not the merged ones quantized once" in found.problems[0]


@pytest.mark.parametrize("name", list(CASES))
def test_another_scale_is_seen(name: str, made: Any, tmp_path: Path) -> None:
    case, merged = made(name)
    weight, info = next(iter(touched(case).items()))
    scales = stored_of(info)[1]
    before = load_file(merged / WEIGHTS)[scales]
    # One step of its dtype; more of a float32, which may differ in its last bits.
    mask, at = (16, 1) if before.dtype == torch.float32 else (1, 0)
    folder = rewritten(case, merged, tmp_path / "off", lambda one: one.update({scales: flipped(before, at, mask)}))
    found = verified(case, folder)
    assert not found.parity and found.problems[0].startswith(weight), found.problems


@pytest.mark.parametrize("name", list(CASES))
def test_a_weight_that_was_left_as_it_was_is_seen(name: str, made: Any, tmp_path: Path) -> None:
    case, merged = made(name)
    before = load_file(case.quantized / WEIGHTS)
    weight, info = list(touched(case).items())[-1]
    folder = rewritten(
        case, merged, tmp_path / "off", lambda one: one.update({key: before[key] for key in stored_of(info)})
    )
    found = verified(case, folder)
    assert not found.parity and found.problems[0].startswith(weight), found.problems


def test_what_lies_beside_merged_weights_is_compared(made: Any, tmp_path: Path) -> None:
    case, merged = made("nf4")
    norm = "model.norm.weight"
    assert (
        "is missing" in verified(case, rewritten(case, merged, tmp_path / "a", lambda one: one.pop(norm))).problems[0]
    )
    more = rewritten(case, merged, tmp_path / "b", lambda one: one.update(extra=torch.zeros(2)))
    assert "extra is in the artifact" in verified(case, more).problems[0]
    bits = rewritten(case, merged, tmp_path / "c", lambda one: one.update({norm: flipped(one[norm], 0, 1)}))
    assert norm in verified(case, bits).problems[0]
    shutil.copytree(merged, tmp_path / "d")
    edit_json(
        tmp_path / "d" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    assert "other settings of the quantization" in verified(case, tmp_path / "d").problems[0]


def test_a_quantized_artifact_of_another_kind_of_base_is_no_parity(made: Any) -> None:
    case, merged = made("nf4")
    found = fossil_export.verify(merged, adapter=case.adapter, base=case.dequantized, level="weights")
    assert not found.parity and any("is quantized (bitsandbytes), and the base" in line for line in found.problems)


def test_answers_are_compared_with_the_trained_models(made: Any) -> None:
    case, merged = made("nf4")
    found = verified(case, merged, "all")
    assert not found.parity and found.verdict == "NOT the trained model"
    assert "it was quantized again (bitsandbytes), which makes another model of it" in found.problems[0]
    assert (
        found.forward is not None and found.forward.artifact.relative_error > 20 * found.forward.trainer.relative_error
    )
    assert 0 < (found.survived or 0) < 1 and not any(check.problem for check in found.tensors or ())


def again(case: Case, weight: str, values: torch.Tensor) -> Tensors:
    """The stored tensors of a weight of these values, on the base's scales if these are kept."""
    base = open_checkpoint(case.quantized)
    coding: Any = base.tensors[weight].coding
    with Files(by_path((base.home, base.files))) as files:
        encoder = coding.encoder(files.codes) if hasattr(coding, "encoder") else coding
        found = encoder.encode(np.ascontiguousarray(values.float().numpy().reshape(-1, coding.width)))
    before = load_file(case.quantized / WEIGHTS)
    return {
        one: torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        .view(before[one].dtype)
        .reshape(value.shape)
        for one, value in found.items()
    }


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("seed", [0, 1])
def test_what_any_order_of_float32_sums_gives_is_right(name: str, seed: int, made: Any, tmp_path: Path) -> None:
    case, merged = made(name)
    exact = merged_by_peft(case, torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: Tensors) -> None:
        for weight in touched(case):
            noise = torch.rand(exact[weight].shape, generator=generator, dtype=torch.float64) * 2 - 1
            tensors |= again(case, weight, exact[weight] * (1 + noise * 2.0**-23))

    found = verified(case, rewritten(case, merged, tmp_path / "noisy", change))
    assert found.parity, found.problems


def test_a_value_halfway_between_two_codes_may_be_either_one(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last row of a wide weight, which is looked at in pieces; the whole update is half a step."""
    monkeypatch.setattr("fossil_export.verifying._nearby.BLOCK", 1 << 12)
    whole, _ = made("packed")
    module = "model.layers.1.mlp.down_proj"
    stored = load_file(whole.quantized / WEIGHTS)
    pairs = stored[f"{module}.weight_packed"][-1].view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], 1).flatten()
    exact = torch.isin(codes, torch.tensor([4, 6, 7, 8, 9, 10]))  # in bfloat16, that is; 8 is zero
    column = int(exact.nonzero()[-1])
    case = replace(whole, adapter=shutil.copytree(whole.adapter, tmp_path / "adapter"))
    path = case.adapter / "adapter_model.safetensors"
    update = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
    update[f"base_model.model.{module}.lora_A.weight"][0, column] = 1
    half_a_step = stored[f"{module}.weight_scale"][-1, column // 64] / 2
    update[f"base_model.model.{module}.lora_B.weight"][-1, 0] = half_a_step / 2  # alpha is twice the rank
    save_file(update, path, {"format": "pt"})
    merge(case, tmp_path / "merged")
    low, high = (int(codes[column]) + up << 4 * (column % 2) for up in (0, 1))

    def with_code(code: int) -> Path:
        def change(tensors: Tensors) -> None:
            found = tensors[f"{module}.weight_packed"][-1].view(torch.uint8)
            found[column // 2] = (found[column // 2] & (0xF0, 0x0F)[column % 2]) | code

        return rewritten(case, tmp_path / "merged", tmp_path / f"with{code}", change)

    assert verified(case, with_code(low)).parity and verified(case, with_code(high)).parity
    assert not verified(case, with_code(low ^ 1 << 4 * (column % 2) + 1)).parity


def test_a_merge_in_which_too_little_is_left_is_refused(made: Any, tmp_path: Path) -> None:
    case, merged = made("packed")
    kept = json.loads((merged / "fossil_export.json").read_text())["survival"]["survived"]
    assert kept < 0.5
    with pytest.raises(MergeError, match=r"keep 4\d.\d% of the update .* less than the 50.0% .*leave out --requantize"):
        fossil_export.merge(case.adapter, tmp_path / "out", base=case.quantized, requantize=True)
    assert not (tmp_path / "out").exists()
    result = merge(case, tmp_path / "out", min_survival=kept - 0.01)
    assert any("survived quantizing again" in line and "without --requantize" in line for line in result.warnings)
    assert not any("float32" in line for line in result.warnings)


def test_shares_are_told_by_module(made: Any) -> None:
    case, merged = made("gptq")
    record = json.loads((merged / "fossil_export.json").read_text())
    shares = {one["module"]: one["survived"] for one in record["tensors"] if "survived" in one}
    assert len(shares) == 14 and all(0.2 < share < 1 for share in shares.values())
    assert shares.keys() == {one.removesuffix(".weight") for one in touched(case)}


@pytest.mark.parametrize("name", ["nf4", "mlx"])
def test_whole_modules_are_quantized_too(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    saved = Case(case.quantized, case.dequantized, trained(case.dequantized, tmp_path / "saved", config))
    merge(saved, tmp_path / "out")
    assert verified(saved, tmp_path / "out").parity
    after = load_file(tmp_path / "out" / WEIGHTS)
    weight = "model.layers.1.mlp.down_proj.weight"
    value = load_file(saved.adapter / "adapter_model.safetensors")[f"base_model.model.{weight}"]
    for one, wanted in again(case, weight, value).items():
        assert torch.equal(after[one], wanted), one
    off = rewritten(
        saved, tmp_path / "out", tmp_path / "off", lambda one: one.update({weight: flipped(after[weight], 7, 1)})
    )
    assert weight in verified(saved, off).problems[0]


@pytest.mark.parametrize("name", ["nested nf4", "channels", "awq"])
def test_methods_that_need_the_weight(name: str, made: Any, tmp_path: Path) -> None:
    case, _ = made(name)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    dora = Case(case.quantized, case.dequantized, trained(case.dequantized, tmp_path / "dora", config))
    merge(dora, tmp_path / "out")
    found = verified(dora, tmp_path / "out")
    assert found.parity, found.problems
