"""A Llama of few weights with a LoRA adapter, and what a merge of the two must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]

HIDDEN, MIDDLE, KEYS, WORDS = 64, 96, 32, 64
PREFIX = "model.layers.0."
LINEARS = {
    f"{PREFIX}self_attn.q_proj": (HIDDEN, HIDDEN),
    f"{PREFIX}self_attn.k_proj": (KEYS, HIDDEN),
    f"{PREFIX}self_attn.v_proj": (KEYS, HIDDEN),
    f"{PREFIX}self_attn.o_proj": (HIDDEN, HIDDEN),
    f"{PREFIX}mlp.gate_proj": (MIDDLE, HIDDEN),
    f"{PREFIX}mlp.up_proj": (MIDDLE, HIDDEN),
    f"{PREFIX}mlp.down_proj": (HIDDEN, MIDDLE),
}
"""Modules, and the shapes of their weights."""
TRAINED = (f"{PREFIX}self_attn.q_proj", f"{PREFIX}mlp.down_proj")
RANK, ALPHA = 4, 8


def write_config(folder: Path, settings: Any = None, dtype: str = "bfloat16", **more: Any) -> None:
    """config.json; with `settings` it says how the weights are quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    config |= {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config | more))


def floats(dtype: str = "bfloat16", linears: bool = True) -> Tensors:
    """The weights; without `linears` those that no quantizer takes."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator) * 0.05).to(getattr(torch, dtype))

    found = {"model.embed_tokens.weight": random(WORDS, HIDDEN)}
    if linears:
        found |= {f"{module}.weight": random(*shape) for module, shape in LINEARS.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        found[f"{PREFIX}{norm}.weight"] = random(HIDDEN) + 1
    return found | {"model.norm.weight": random(HIDDEN) + 1, "lm_head.weight": random(WORDS, HIDDEN)}


def lora() -> Tensors:
    """An adapter's tensors, by PEFT's names."""
    import torch

    generator = torch.Generator().manual_seed(8)
    found = {}
    for module in TRAINED:
        outputs, inputs = LINEARS[module]
        for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            found[f"base_model.model.{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.1
    return found


def write_adapter(folder: Path, **settings: Any) -> None:
    """A folder as PEFT saves it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    names = [module.rpartition(".")[2] for module in TRAINED]
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM", **settings).save_pretrained(
        folder
    )
    save_file(lora(), folder / "adapter_model.safetensors", {"format": "pt"})


def updates(adapter: Tensors | None = None) -> Tensors:
    """What PEFT adds to each weight, in float64: alpha / r · B A."""
    own = lora() if adapter is None else adapter
    found = {}
    for name, down in own.items():
        if name.endswith(".lora_A.weight"):
            up = own[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = ALPHA / down.shape[0] * (up.double() @ down.double())
    return found


def merged_problem(folder: Path, weights: Mapping[str, tuple[Any, Any]], deltas: Mapping[str, Any]) -> str | None:
    """What is wrong with the merged model of `folder`: its tensors must be the `weights`, each (value, the size of what
    it was summed up of) in float64, and the `deltas` that are added to some."""
    import torch
    from safetensors.torch import load_file

    found = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    if found.keys() != weights.keys():
        return f"has other tensors: {sorted(found.keys() ^ weights.keys())[:4]}"
    for name, (value, size) in weights.items():
        own, delta = found[name], deltas.get(name, 0.0)
        if own.shape != value.shape:
            return f"{name} is {list(own.shape)}, not {list(value.shape)}"
        if not own.is_floating_point():
            if not torch.equal(own, value.to(own.dtype)):
                return f"{name} differs"
            continue
        least = 2.0**-23 if own.dtype == torch.float16 else 2.0**-120
        bound = 2.0**-6 * (size + (delta.abs() if torch.is_tensor(delta) else 0.0)) + least
        expected = value + delta
        same = (own.double() == expected) | (own.double().isnan() & expected.isnan())
        wrong = ~(same | ((own.double() - expected).abs() <= bound))
        if wrong.any():
            at = int(wrong.flatten().nonzero()[0])
            values = float(own.flatten()[at]), float(expected.flatten()[at])
            return f"{name} has {values[0]!r} at {at}, not {values[1]!r}; {int(wrong.sum())} are wrong"
    return None


def as_they_are(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value.double(), value.double().abs()) if value.is_floating_point() else (value, value)
        for name, value in tensors.items()
    }
