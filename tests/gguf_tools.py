"""Tiny models of every family that GGUF LoRA files are made for, and the files read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import make_adapter
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert

Array = np.ndarray[Any, Any]

HIDDEN, INNER, HEADS, GROUPS, WIDTH, VOCABULARY = 48, 96, 4, 2, 16, 120
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Kind:
    """A model of transformers and what llama.cpp makes of it: its name, whether q and k are reordered."""

    config: str
    architecture: str
    rotary: bool
    targets: tuple[str, ...] = tuple(SEPARATE)


KINDS = {
    "llama": Kind("LlamaConfig", "llama", True),
    "mistral": Kind("MistralConfig", "llama", True),
    "smollm3": Kind("SmolLM3Config", "smollm3", True),
    "granite": Kind("GraniteConfig", "granite", True),
    "qwen2": Kind("Qwen2Config", "qwen2", False),
    "qwen3": Kind("Qwen3Config", "qwen3", False),
    "gemma": Kind("GemmaConfig", "gemma", False),
    "gemma2": Kind("Gemma2Config", "gemma2", False),
    "gemma3_text": Kind("Gemma3TextConfig", "gemma3", False),
    "phi3": Kind("Phi3Config", "phi3", False, tuple(PACKED)),
}


def make_kind(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model of a family with random weights; where the family has one, heads wider than hidden / heads."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind not in {"qwen2", "phi3", "granite", "smollm3"}:
        sizes["head_dim"] = WIDTH
    config = getattr(transformers, KINDS[kind].config)(**sizes | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@dataclass
class Case:
    base: Path
    adapter: Path
    trained: Any

    def update(self, module: str) -> Array:
        """PEFT's update (out, in) of a module, on a weight of zeros, so that nothing is rounded away."""
        layer = self.trained.base_model.model.get_submodule(module)
        blank = torch.zeros_like(layer.get_base_layer().weight)
        value: Array = layer.get_delta_weight_miss("default", blank).detach().numpy()
        return value

    def write(self, output: Path, **options: Any) -> dict[str, Any]:
        made = convert(self.adapter, output, to="gguf-lora", **{"base": self.base, **options})
        return {**made.details, "warnings": list(made.warnings)}


def make(folder: Path, kind: str = "llama", config: dict[str, Any] | None = None, **changes: Any) -> Case:
    base = make_kind(folder / "base", kind, **(config or {}))
    changes.setdefault("target_modules", list(KINDS[kind].targets))
    trained = make_adapter(folder / "adapter", base, **changes)
    return Case(base, folder / "adapter", trained)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make(tmp_path)


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], Array]]:
    """Type, NumPy shape and values in float32 of every tensor of a file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        found[tensor.name] = (tensor.tensor_type.name, shape, values)
    return found


def restored(rows: Array, heads: int) -> Array:
    """transformers' order of rows that llama.cpp keeps pairwise: of a head's rows, the even ones, then the odd ones."""
    width = len(rows) // heads
    order = [head * width + half + 2 * i for head in range(heads) for half in (0, 1) for i in range(width // 2)]
    return rows[order]


def in_order(rows: Array, module: str, rotary: bool) -> Array:
    heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(module.rpartition(".")[2])
    return restored(rows, heads) if rotary and heads else rows


def without_head(case: Case) -> None:
    """PEFT stores a targeted head beside its shard unless told otherwise."""
    case.trained.save_pretrained(case.adapter, save_embedding_layers=False)


def gguf_name(module: str) -> str:
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def refused(match: str, case: Case, tmp_path: Path, **options: Any) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FossilExportError, match=match) as caught:
        case.write(tmp_path / "out.gguf", **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
