"""Every kind of adapter that PEFT has is either known or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from conftest import LINEARS, edit_json, make_adapter
from peft import PeftType, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fossil_export import load_adapter
from fossil_export.adapters._trained import formats
from fossil_export.adapters._unmergeable import UNMERGEABLE
from fossil_export.errors import AdapterError

ELSEWHERE = {"ADALORA", "BOFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "ROAD", "TRAINABLE_TOKENS"}
"""Types that other files bring in; one that is in `formats()` by now does not need to be here."""


def test_no_type_of_the_installed_peft_is_forgotten() -> None:
    told = set(formats()) | set(UNMERGEABLE) | ELSEWHERE
    assert [one.value for one in PeftType if one.value not in told] == []


def test_no_type_is_both_known_and_refused() -> None:
    assert set(formats()) & set(UNMERGEABLE) == set()


def test_no_refused_type_is_made_up() -> None:
    assert set(UNMERGEABLE) <= {one.value for one in PeftType}


@pytest.mark.parametrize("name", list(UNMERGEABLE))
def test_a_refusal_is_one_line_that_says_why_and_what_to_do(name: str, base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", peft_type=name)
    with pytest.raises(AdapterError) as refusal:
        load_adapter(tmp_path / "adapter")
    line = str(refusal.value)
    assert f"peft_type is {name!r}: " in line and "\n" not in line and len(line) - len(str(tmp_path)) < 260
    assert "PEFT" in UNMERGEABLE[name]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_a_prompt_that_peft_trained_is_refused_for_what_it_is(kind: Any, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt.save_pretrained(tmp_path / "prompt")
    with pytest.raises(AdapterError, match="vectors before the tokens and changes no weight; serve it with PEFT"):
        load_adapter(tmp_path / "prompt")


def test_a_lily_that_peft_trained_is_refused_for_what_it_is(base: Path, tmp_path: Path) -> None:
    options = {"stride_A": 1, "num_B": 2, "r": 4}
    make_adapter(tmp_path / "lily", base, kind=peft.LilyConfig, target_modules=LINEARS[:2], **options)
    with pytest.raises(AdapterError, match="mixed anew for each input"):
        load_adapter(tmp_path / "lily")


def test_a_type_of_a_newer_peft_is_refused_with_what_is_known(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", peft_type="NEXT_YEARS")
    with pytest.raises(AdapterError, match=r"'NEXT_YEARS', not one that fossil-export knows \(MISS"):
        load_adapter(tmp_path / "adapter")
