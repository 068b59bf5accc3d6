"""Small bases in mxfp4, with what transformers dequantizes them to, and random adapters of PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fossil_export

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 90,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def gpt_oss(folder: Path, dtype: str = "bfloat16", **sizes: Any) -> tuple[Path, Path]:
    """(quantized, dequantized by transformers) folders of a random GptOss with random codes."""
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(**SIZES | sizes)).to(getattr(torch, dtype))
    model.save_pretrained(folder / "dequantized")
    plain = load_file(folder / "dequantized" / "model.safetensors")
    coded = dict(plain)
    for name, value in plain.items():
        if not name.endswith("_proj") or value.ndim != 3:
            continue
        experts, inputs, outputs = value.shape
        del coded[name]
        coded[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16)).to(torch.uint8)
        coded[f"{name}_scales"] = torch.randint(117, 123, (experts, outputs, inputs // 32)).to(torch.uint8)
        plain[name] = convert_moe_packed_tensors(
            coded[f"{name}_blocks"], coded[f"{name}_scales"], dtype=getattr(torch, dtype)
        )
    save_file(plain, folder / "dequantized" / "model.safetensors", {"format": "pt"})
    return stored_as(folder / "quantized", folder / "dequantized", coded, SETTINGS), folder / "dequantized"


def stored_as(
    folder: Path,
    like: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    metadata: dict[str, str] | None = None,
) -> Path:
    """A folder with these tensors, and the config of another with these settings."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def trained(base: Path, folder: Path, config: Any, loader: Any = AutoModelForCausalLM) -> Path:
    """An adapter of this config with random values, over a plain base."""
    torch.manual_seed(2)
    peft = get_peft_model(loader.from_pretrained(base), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "miss_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(folder)
    return folder


def assert_same_merge(adapter: Path, quantized: Path, dequantized: Path, work: Path) -> None:
    """A merge into the quantized base is, byte for byte, that into the dequantized one; its config is plain, and
    verify says so."""
    results = []
    for name, base in (("of_quantized", quantized), ("of_plain", dequantized)):
        fossil_export.merge(adapter, work / name, base=base)
        results.append(load_file(work / name / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    before = load_file(dequantized / "model.safetensors")
    changed = [name for name, value in results[1].items() if name in before and not torch.equal(value, before[name])]
    assert changed, "nothing was merged"
    for name, value in results[1].items():
        assert results[0][name].dtype == value.dtype and torch.equal(results[0][name], value), name
    config = json.loads((work / "of_quantized" / "config.json").read_text())
    assert config == json.loads((work / "of_plain" / "config.json").read_text())
    verdict = fossil_export.verify(work / "of_quantized", adapter=adapter, base=quantized, level="weights")
    assert verdict.parity, verdict.problems
