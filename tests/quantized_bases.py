"""Small quantized bases, each with what its library dequantizes it to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fossil_export

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def plain_model(folder: Path, dtype: str = "bfloat16") -> Path:
    """A random Llama, saved in `dtype`."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The weights that quantizers take: of all linear layers but the head."""
    return [name for name, value in tensors.items() if value.ndim == 2 and "embed" not in name and "head" not in name]


def adapter_for(base: Path, folder: Path) -> Path:
    """A LoRA on all linear layers of a plain base, with random weights."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(folder)
    return folder


def write(folder: Path, base: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    """A quantized folder: these tensors, and the base's config with these settings."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def fp8_folder(work: Path, scale: str = "float32", base: Path | None = None) -> tuple[Path, Path]:
    """(quantized, dequantized by transformers) folders, of a random model or of `base`."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    base = base or plain_model(work / "plain")
    tensors = load_file(base / "model.safetensors")
    quantized, truth = dict(tensors), dict(tensors)
    owner = Fp8Dequantize(FineGrainedFP8Config())
    for name in linears(tensors):
        value = tensors[name].float()
        rows, columns = value.shape
        grid = value.abs().reshape(rows // 64, 64, columns // 64, 64).amax((1, 3)) / 448
        grid = grid.log2().ceil().exp2() if scale == "float8_e8m0fnu" else grid
        grid = grid.to(getattr(torch, scale))
        codes = value / grid.float().repeat_interleave(64, 0).repeat_interleave(64, 1)
        quantized[name] = codes.to(torch.float8_e4m3fn)
        quantized[f"{name}_scale_inv"] = grid
        truth[name] = owner._dequantize_one(quantized[name], grid, torch.bfloat16)
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    return write(work / "quantized", base, quantized, settings), _truth(work, base, truth)


def _truth(work: Path, base: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = work / "dequantized"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def merged_equal(quantized: Path, dequantized: Path, work: Path) -> None:
    """A merge into the quantized base is, byte for byte, that into the dequantized one, and its config is plain."""
    adapter = adapter_for(dequantized, work / "adapter")
    results = []
    for name, base in (("of_quantized", quantized), ("of_plain", dequantized)):
        fossil_export.merge(adapter, work / name, base=base)
        results.append(load_file(work / name / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        assert results[0][name].dtype == value.dtype and torch.equal(results[0][name], value), name
    config = json.loads((work / "of_quantized" / "config.json").read_text())
    assert config == json.loads((work / "of_plain" / "config.json").read_text())
    verdict = fossil_export.verify(work / "of_quantized", adapter=adapter, base=quantized, level="weights")
    assert verdict.parity, verdict.problems
