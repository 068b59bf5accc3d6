"""Adapters whose training quantized the base on loading (QLoRA), merged into the base that it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_bases import adapter_for, plain_model
from quantized_training import as_loaded, card, settings
from safetensors.torch import load_file

from fossil_export import merge, plan_merge
from fossil_export.errors import AdapterError, MergeError


def same(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("base") / "plain")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    return adapter_for(plain, tmp_path / "adapter")


@pytest.mark.parametrize(
    "asked",
    [
        settings(),
        settings(double_quant=False),
        settings("fp4", False),
        settings(llm_int8_skip_modules=["q_proj", "lm_head"]),
    ],
)
def test_a_merge_is_that_into_what_bitsandbytes_loads(
    asked: dict[str, Any], plain: Path, adapter: Path, tmp_path: Path
) -> None:
    seen = as_loaded(plain, tmp_path / "seen", asked)
    merge(adapter, tmp_path / "wanted", base=seen, trained_on="unquantized")
    (adapter / "README.md").write_text(card(asked))
    result = merge(adapter, tmp_path / "merged")
    same(tmp_path / "merged", tmp_path / "wanted")
    assert result.plan.trained_on is not None and not any("it seems" in line for line in result.warnings)
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert record["into"] == "trained" and record["trained_on"]["kind"] == asked["bnb_4bit_quant_type"]
    assert record["trained_on"]["double_quant"] == asked["bnb_4bit_use_double_quant"]
