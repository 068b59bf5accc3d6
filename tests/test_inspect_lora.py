"""`inspect` says of any adapter what it changes, and by how much: held against PEFT's merge."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base, weights
from hub_tools import cli, fetched
from loopback import LoopbackHub
from peft import LoraConfig, PeftModel
from several_tools import trained
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fossil_export.merging._sizes as sizes_module
from fossil_export import inspect, merge
from fossil_export.merging._sizes import Size, _slices

LORA: dict[str, Any] = {"kind": LoraConfig}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA | {"lora_alpha": 13, "use_rslora": True},
    "patterns": LORA | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "lora of an embedding": LORA | {"target_modules": ["embed_tokens", "q_proj"]},
    "tile": {"r": 7},
    "mini": {"init_weights": "mini", "mini_r": 8},
    "bat": {"init_weights": "bat"},
}


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    state = PeftModel.from_pretrained(model, adapter).to(torch.float64).merge_and_unload().state_dict()
    return {name: value.detach() for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(KINDS))
def test_every_update_is_as_large_as_pefts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = trained(tmp_path / "adapter", base, 1, **KINDS[name])
    found = inspect(adapter)
    plain, theirs = weights(base), merged_by_peft(base, adapter)
    assert found.problems == () and set(found.sizes) == set(found.adapter.trained)
    for module, size in found.sizes.items():
        before = plain[f"{module}.weight"].double()
        change = torch.linalg.norm(theirs[f"{module}.weight"] - before)
        assert size.update == pytest.approx(float(change), rel=1e-5)
        assert size.weight == pytest.approx(float(torch.linalg.norm(before)), rel=1e-5)
        assert size.ratio == pytest.approx(float(change / torch.linalg.norm(before)), rel=1e-5) and size.share == 1


def test_conv1d_and_a_head_that_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=80, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["c_attn"], fan_in_fan_out=True)
    found, theirs, plain = inspect(tmp_path / "adapter"), merged_by_peft(base, tmp_path / "adapter"), weights(base)
    before, after = (state["transformer.h.1.attn.c_attn.weight"].double() for state in (plain, theirs))
    size = found.sizes["transformer.h.1.attn.c_attn"]
    assert size.ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    llama = make_base(tmp_path / "llama")
    trained(tmp_path / "saved", llama, 2, **LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = inspect(tmp_path / "saved")
    before = weights(llama)["lm_head.weight"]
    after = weights(tmp_path / "saved")["base_model.model.lm_head.weight"]
    whole = found.sizes["lm_head.weight"]
    assert whole.share == 1 and whole.update == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert whole.weight == pytest.approx(float(before.norm()), rel=1e-5)
    (kind,) = (kind for kind in found.kinds if kind.method == "whole")
    assert kind.name == kind.tensor == "lm_head.weight" and list(kind.ratios) == [whole.ratio]
    monkeypatch.setattr(sizes_module, "LIMIT", 8 * 48 * 4)
    part = inspect(tmp_path / "saved").sizes["lm_head.weight"]
    assert part.share == 8 / 120 and part.ratio == pytest.approx(whole.ratio, rel=0.1)


def test_kinds_in_the_table_and_as_json(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = trained(
        tmp_path / "adapter", base, 1, **LORA, target_modules=["embed_tokens", *QV], modules_to_save=["lm_head"],
        rank_pattern={"v_proj": 2},
    )  # fmt: skip
    text = cli("inspect", adapter).stdout
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    head = ["module", "trained", "shapes", "base", "tensor", "‖ΔW‖/‖W‖", "×"]
    assert lines["module"] == head
    assert lines["model.layers.{0–1}.self_attn.q_proj"][1:4] == ["lora", "r=8", "s=1"]
    assert lines["model.layers.{0–1}.self_attn.v_proj"][1:4] == ["lora", "r=2", "s=4"]
    assert lines["model.embed_tokens"][1] == "lora_embedding" and lines["lm_head.weight"][1] == "whole"
    assert "method      lora_embedding (1), lora (4)" in text and "rank        8 (3), 2 (2)" in text
    found = json.loads(cli("inspect", adapter, "--json").stdout)
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    kind = kinds["model.layers.{0–1}.self_attn.q_proj"]
    modules = [entry["change"]["ratio"] for entry in found["modules"] if entry["module"].endswith("q_proj")]
    assert (kind["method"], kind["rank"], kind["scale"], kind["modules"]) == ("lora", 8, 1.0, 2)
    assert kind["base_tensor"] == "model.layers.{0–1}.self_attn.q_proj.weight"
    assert [kind["change"]["least"], kind["change"]["most"]] == [min(modules), max(modules)]
    assert min(modules) < kind["change"]["ratio"] < max(modules)
    assert found["methods"] == {"lora": 4, "lora_embedding": 1}
    every = cli("inspect", adapter, "--all").stdout
    assert "model.layers.1.self_attn.v_proj" in every and "{0–1}" not in every


def test_of_large_weights_some_rows_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base, 1, init_weights="bat", r=4)
    whole = inspect(adapter).sizes
    monkeypatch.setattr(sizes_module, "LIMIT", 8 * 48 * 4)
    for module, size in inspect(adapter).sizes.items():
        assert 0 < size.share < 0.51 and size.ratio == pytest.approx(whole[module].ratio, rel=0.3)
    assert "of large weights 8% of the rows or more were read" in cli("inspect", adapter).stdout


@pytest.mark.parametrize("rows, unit, most", [(10, 1, 3), (96, 8, 40), (1000, 1, 100), (7, 4, 1), (64, 64, 1)])
def test_slices_are_whole_units_within_the_weight(rows: int, unit: int, most: int) -> None:
    found = list(_slices(rows, unit, most))
    assert all(
        start % unit == 0 and start < stop <= rows and (stop % unit == 0 or stop == rows) for start, stop in found
    )
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    assert sum(stop - start for start, stop in found) <= max(most, unit)


def test_a_base_on_the_hub_stays_there(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", models / "base", 1, **LORA)
    found = inspect(adapter, "ada/base")
    assert not [name for name in fetched(hosted) if name.endswith(".safetensors")] or hosted.moved()[0] < 100_000
    size = found.sizes["model.layers.0.self_attn.q_proj"]
    known = inspect(adapter, models / "base").sizes["model.layers.0.self_attn.q_proj"]
    assert size == Size(known.update, None) and size.ratio is None
    assert (
        "not measured: the base's weights are not on this machine"
        in cli("inspect", adapter, "--base", "ada/base").stdout
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=...)
    assert inspect(adapter).sizes == {} and "not checked" in cli("inspect", adapter).stdout


def test_what_stops_it_is_told_without_sizes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base, 1, **LORA)
    merge(adapter, tmp_path / "merged")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 49}))
    for file in base.glob("*.safetensors"):
        file.unlink()
    done = cli("inspect", adapter, "--base", base, code=1)
    assert "stopped: " in done.stdout and "%" not in done.stdout
