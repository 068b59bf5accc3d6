"""Small bases as a quantized training sees them, by bitsandbytes itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D


def settings(kind: str = "nf4", double_quant: bool = True, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    """What a training script gives to transformers' BitsAndBytesConfig."""
    if kind == "int8":
        return {"load_in_8bit": True, **more}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        **more,
    }


def card(asked: dict[str, Any]) -> str:
    """The README.md that PEFT wrote beside an adapter that was trained so."""
    fields = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    }
    lines = [f"- {key}: {value}" for key, value in (fields | asked).items()]
    said = "The following `bitsandbytes` quantization config was used during training:"
    return "\n".join(["---", "library_name: peft", "---", "## Training procedure", "", "", said, *lines, ""])


def as_loaded(base: Path, folder: Path, asked: dict[str, Any], dtype: str = "bfloat16") -> Path:
    """The base with the weights that transformers and bitsandbytes load of it, dequantized, in `dtype`."""
    import bitsandbytes as bnb

    config = BitsAndBytesConfig(**asked)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=getattr(torch, dtype), device_map="cpu"
    )
    tensors = load_file(base / "model.safetensors")
    quantized = 0
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Its code for CPUs gives wrong values if blocks do not end with rows, but not for a vector.
            state = module.weight.quant_state
            shape, state.shape = state.shape, torch.Size([math.prod(state.shape)])
            weight = bnb.functional.dequantize_4bit(module.weight.data, state).reshape(shape)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(
                getattr(torch, dtype)
            )
        else:
            continue
        quantized += 1
        stored = next(one for one in (f"{name}.weight", f"{name}.weight".partition(".")[2]) if one in tensors)
        weight = weight.T if issubclass(module.source_cls, Conv1D) else weight
        assert weight.shape == tensors[stored].shape and not torch.equal(weight, tensors[stored])
        tensors[stored] = weight.contiguous()
    assert quantized
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder
