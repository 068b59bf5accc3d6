"""Verification does not cry wolf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_tools
from conftest import edit_json, make_adapter, make_base, real_variant
from transformers import BertConfig, BertModel, LlamaForSequenceClassification
from verify_tools import Q1, as_bone, tamper

from fossil_export import merge, verify
from fossil_export.verifying import _forward

bf16 = verify_tools.bf16


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("variant", ["tile", "mini", "bat"])
def test_every_variant_and_dtype_passes(variant: str, dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    options: dict[str, Any] = {"tile": {}, "mini": {"init_weights": "mini", "mini_r": 8}}.get(
        variant, {"init_weights": "bat"}
    )
    make_adapter(tmp_path / "adapter", base, **options)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems
    assert result.forward is not None and result.forward.continuations == 4
    merged = [check for check in result.tensors or () if check.action == "merge"]
    assert len(merged) == 14 and all(check.elements and 0 <= check.worst < 0.51 for check in merged)


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tensors_pass(legacy: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head", "embed_tokens"])
    if legacy:
        as_bone(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems


def test_what_users_change_in_a_config_makes_no_other_model(bf16: Path) -> None:
    config = json.loads((bf16 / "config.json").read_bytes())
    free = {"pad_token_id": 5, "eos_token_id": [1, 2], "use_cache": False, "temperature": 0.7, "dtype": "float32"}
    edit_json(bf16 / "config.json", **free, transformers_version="4.0", _name_or_path="mine", unheard=None)
    assert verify(bf16, level="weights").problems == ("config.json has another unheard than base and adapter ask for",)
    del config["mlp_bias"], config["attention_dropout"]  # the class has them by default
    (bf16 / "config.json").write_text(json.dumps({**config, **free}))
    assert verify(bf16, level="weights").parity


def test_classifier_and_resized_vocabulary_pass(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "cls", base, model_class=LlamaForSequenceClassification, task_type="SEQ_CLS")
    edit_json(base / "config.json", pad_token_id=0)
    merge(tmp_path / "cls", tmp_path / "classifier")
    result = verify(tmp_path / "classifier")
    assert result.parity and result.forward is not None and result.forward.continuations == 0
    make_adapter(tmp_path / "vocab", base, resize=128)
    merge(tmp_path / "vocab", tmp_path / "resized")
    assert verify(tmp_path / "resized").parity


def test_encoder_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    from transformers import AutoModel

    make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=AutoModel, target_modules=["query", "value"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems


def test_legacy_adapters_pass_and_are_caught(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    as_bone(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged").parity
    tamper(tmp_path / "merged", f"{Q1}.weight", lambda old: old * 3)
    result = verify(tmp_path / "merged", level="forward")
    assert result.forward is not None and result.forward.first_outside == Q1


OPENINGS = ("The history of", "How to repair", "A short poem about", "Three facts about", "import os  #")
SUBJECTS = (
    "the sea is",
    "a bicycle:",
    "green shells",
    "Ophelia",
    "clocks,",
    "winter in",
    "bread",
    "x = 42",
    "Rom",
    "1",
)
FIFTY = tuple(f"{opening} {subject}" for opening in OPENINGS for subject in SUBJECTS)


def test_does_not_cry_wolf_on_the_real_model(real_adapter: Path, tmp_path: Path) -> None:
    merge(real_adapter, tmp_path / "merged")
    (tmp_path / "prompts.txt").write_text("\n".join(FIFTY))
    assert len(set(FIFTY)) == 50
    result = verify(tmp_path / "merged", prompts=tmp_path / "prompts.txt")
    assert result.parity, result.problems
    assert result.forward is not None and result.forward.prompts == 50
    assert result.forward.trainer_dtype == "bfloat16" and result.forward.artifact.top1 > 0.9


@pytest.mark.parametrize("variant", ["ragged", "mini", "bat"])
def test_other_variants_of_the_real_model(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_forward, "PROMPTS", ())  # for time: a prompt through bat takes seconds
    merge(real_variant(variant), tmp_path / "merged")
    (tmp_path / "prompts.txt").write_text("\n".join(FIFTY[::10]))
    result = verify(tmp_path / "merged", prompts=tmp_path / "prompts.txt")
    assert result.parity, result.problems
