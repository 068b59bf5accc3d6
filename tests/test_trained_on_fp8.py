"""Adapters that were trained over a base which transformers quantized to fp8 as it was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import make_adapter
from peft import LoraConfig
from quantized_bases import linears, plain_model
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import fossil_export
from fossil_export.cli import main
from fossil_export.errors import MergeError

SIZES = {"hidden_size": 256, "intermediate_size": 384}


class Owner:
    quantization_config = FineGrainedFP8Config()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_model(tmp_path / "base")


def as_loaded(base: Path, folder: Path) -> Path:
    """The base with its linear layers quantized and dequantized by transformers."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    for name in linears(tensors):
        stored = Fp8Quantize(Owner())._quantize_one(name, tensors[name])
        if len(stored) == 2:
            codes, scales = stored.values()
            tensors[name] = Fp8Dequantize(Owner())._dequantize_one(codes, scales, tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def test_it_is_merged_into_what_transformers_loads(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=["q_proj", "down_proj"])
    fossil_export.merge(tmp_path / "adapter", tmp_path / "out", base=base, trained_on="fp8")
    want = as_loaded(base, tmp_path / "loaded")
    fossil_export.merge(tmp_path / "adapter", tmp_path / "wanted", base=want, trained_on="unquantized")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    plain = load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = {name for name in plain if "proj" in name and not torch.equal(found[name], plain[name])}
    assert "model.layers.0.self_attn.o_proj.weight" in changed  # not targeted, but quantized in training
    assert "model.layers.0.mlp.up_proj.weight" not in changed  # 320 rows: blocks of 128 do not divide it
    assert fossil_export.verify(tmp_path / "out", level="weights").parity


def test_experts_are_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    MixtralForCausalLM(MixtralConfig(**SIZES, **sizes, num_local_experts=2)).save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base", kind=LoraConfig, target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"mlp\.experts is quantized to fp8 in another way"):
        fossil_export.merge(tmp_path / "adapter", tmp_path / "out", trained_on="fp8")


def test_other_options_are_refused_with_it(tmp_path: Path) -> None:
    command = ["merge", str(tmp_path), "-o", str(tmp_path / "out"), "--trained-on", "fp8", "--bnb-4bit-blocksize", "64"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "--trained-on fp8 takes no --bnb-4bit-" in result.stderr
