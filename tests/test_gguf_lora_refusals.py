"""What cannot become a GGUF LoRA file is refused, and nothing is written."""

from __future__ import annotations

import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import gguf
import gguf_tools
import pytest
import torch
from conftest import edit_json
from gguf_tools import Case, make, refused, without_head
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError

case = gguf_tools.case


def test_bat_is_refused(tmp_path: Path) -> None:
    refused("bat adapter.*--to lora with --rank", make(tmp_path, r=8, init_weights="bat"), tmp_path)


def test_whole_trained_tensors_are_refused(tmp_path: Path) -> None:
    refused(
        r"whole trained tensors \(lm_head.weight\).*merge it", make(tmp_path, modules_to_save=["lm_head"]), tmp_path
    )


def test_biases_are_refused(tmp_path: Path) -> None:
    case = make(tmp_path, "qwen2", bias="miss_only", target_modules=["q_proj"])
    refused(r"whole trained tensors \(model.layers.0.self_attn.q_proj.bias", case, tmp_path)


def test_a_family_that_an_older_gguf_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {kind.name: kind.value for kind in gguf.MODEL_ARCH if kind.name != "SMOLLM3"}
    monkeypatch.setattr(gguf, "MODEL_ARCH", IntEnum("MODEL_ARCH", older))
    refused(r"SMOLLM3.*does not know: pip install --upgrade gguf", make(tmp_path, "smollm3"), tmp_path)


@pytest.mark.parametrize("declared", [True, None])
def test_tied_head_is_refused(declared: bool | None, tmp_path: Path) -> None:
    """Also where only transformers' default for the family ties it."""
    case = make(tmp_path, "gemma", target_modules=["lm_head"])
    without_head(case)
    edit_json(case.base / "config.json", tie_word_embeddings=... if declared is None else declared)
    refused("ties lm_head to the embedding.*merge the adapter", case, tmp_path)


def test_module_without_a_tensor(tmp_path: Path) -> None:
    case = make(tmp_path)
    weights = case.adapter / "adapter_model.safetensors"
    strange = "model.vision_tower.layers.0.self_attn.q_proj"
    shards = load_file(weights)
    shards[f"base_model.model.{strange}.miss_block"] = shards[
        "base_model.model.model.layers.0.self_attn.q_proj.miss_block"
    ]
    save_file({name: value.clone() for name, value in shards.items()}, weights)
    refused(f"llama has no tensor for {strange};", case, tmp_path, base=None, base_config=case.base)


def test_layer_that_the_base_lacks(case: Case, tmp_path: Path) -> None:
    edit_json(case.base / "config.json", num_hidden_layers=1)
    refused("no tensor for model.layers.1.mlp.down_proj,.* and 2 more;", case, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'.*known for llama"),
        ({"model_type": ...}, "model_type is None"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not halve the 32 rows of model.layers.0"),
    ],
)
def test_config_that_does_not_tell(change: dict[str, Any], match: str, case: Case, tmp_path: Path) -> None:
    edit_json(case.base / "config.json", **change)
    refused(match, case, tmp_path)


def test_no_config(case: Case, tmp_path: Path) -> None:
    (case.base / "config.json").unlink()
    refused("has no config.json.*name its folder with --base", case, tmp_path)
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path=None)
    refused("does not name its base model.*--base", case, tmp_path, base=None)


def test_numbers_that_are_none(case: Case, tmp_path: Path, **options: Any) -> None:
    """Found in the last shard, when all others are written."""
    weights = case.adapter / "adapter_model.safetensors"
    shards = load_file(weights)
    shards["base_model.model.model.layers.1.self_attn.v_proj.miss_block"][3, 4] = torch.nan
    save_file(shards, weights)
    refused("layers.1.self_attn.v_proj.miss_block holds infinite or NaN", case, tmp_path, **options)


@pytest.mark.parametrize(("outtype", "value"), [("f16", 7e4), ("q8_0", 1e7)])
def test_numbers_that_the_format_cannot_hold(outtype: str, value: float, case: Case, tmp_path: Path) -> None:
    weights = case.adapter / "adapter_model.safetensors"
    shards = load_file(weights)
    shards["base_model.model.model.layers.1.self_attn.q_proj.miss_block"][3, 4] = -value
    save_file(shards, weights)
    refused(
        f"layers.1.self_attn.q_proj holds .*, more than {outtype} can; use --outtype f32",
        case,
        tmp_path,
        outtype=outtype,
    )
    assert case.write(tmp_path / "out.gguf")["exact"]


def test_options_that_make_no_sense(case: Case, tmp_path: Path) -> None:
    refused("outtype is 'q4_0', expected f32, f16, q8_0", case, tmp_path, outtype="q4_0")
    refused("--to gguf-lora takes no --rank, which is for lora; leave it out", case, tmp_path, rank=4)


def test_output_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match="is a folder; name a file"):
        (tmp_path / "folder").mkdir()
        case.write(tmp_path / "folder")
    with pytest.raises(FossilExportError, match="cannot be written: its folder does not exist"):
        case.write(tmp_path / "nowhere" / "adapter.gguf")


def test_an_earlier_file_stays_when_writing_fails(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"GGUF, earlier")
    test_numbers_that_are_none(case, tmp_path, overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"GGUF, earlier"


def test_missing_library(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"writing GGUF needs gguf: .*pip install 'fossil-export\[gguf\]'", case, tmp_path)
