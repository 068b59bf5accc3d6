"""Bases of real names, shapes and file sizes, and adapters for them: headers before holes, so that they take no disk.

Sources: the models' config.json (meta-llama/Llama-3.1-8B, 70B, 405B; deepseek-ai/DeepSeek-V3; moonshotai/Kimi-K2) and
the files of their repositories. DeepSeek-V3 is without its layer for predicting several tokens (90,427 tensors of
91,991).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._dtypes import byte_count
from fossil_export.checkpoints._header import encode_header

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


@dataclass(frozen=True)
class Shape:
    """A model: its config, its linear weights by module (out, in), its other tensors, and its files. `limit` is the
    size in bytes that a file is filled up to, or a `count` of files, or one for each layer if both are None."""

    name: str
    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, ...]]
    fp8: bool = False
    limit: int | None = None
    count: int | None = None

    def tensors(self) -> Iterator[Tensor]:
        """In the order of the layers, as the files have them."""
        outer = [name for name in self.others if "layers." not in name]
        first = [name for name in outer if "embed" in name]
        for name in first:
            yield name, "BF16", self.others[name]
        inner = [(_layer(name), name) for name in (*self.others, *self.linears) if "layers." in name]
        for _, name in sorted(inner, key=lambda pair: pair[0]):
            if name in self.others:
                yield name, "F32" if name.endswith("correction_bias") else "BF16", self.others[name]
                continue
            rows, columns = self.linears[name]
            yield f"{name}.weight", "F8_E4M3" if self.fp8 else "BF16", (rows, columns)
            if self.fp8:
                yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))
        for name in outer:
            if name not in first:
                yield name, "BF16", self.others[name]

    def files(self) -> list[list[Tensor]]:
        tensors = list(self.tensors())
        if self.limit is not None:
            return filled(tensors, self.limit)
        if self.count is not None:
            low, high = 1, sum(_nbytes(tensor) for tensor in tensors)
            while low < high:  # the smallest limit that gives so few files
                middle = (low + high) // 2
                low, high = (low, middle) if len(filled(tensors, middle)) <= self.count else (middle + 1, high)
            return filled(tensors, low)
        layers: dict[int, list[Tensor]] = {}
        last = max(_layer(name) for name, _, _ in tensors)
        for tensor in tensors:
            number = _layer(tensor[0])
            layers.setdefault(number if number >= 0 else 0 if "embed" in tensor[0] else last, []).append(tensor)
        return list(layers.values())


def filled(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors in order, in files of at most `limit` bytes each, as transformers cuts them."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + _nbytes(tensor) > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += _nbytes(tensor)
    return groups


def _nbytes(tensor: Tensor) -> int:
    return byte_count(tensor[1], tensor[2])


def _layer(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1


def llama(name: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 128256) -> Shape:
    keys = 8 * (hidden // heads)
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    own = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden)}
    own = {f"self_attn.{name}": shape for name, shape in own.items()}
    own |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    found: dict[str, tuple[int, ...]] = dict(others)
    for layer in range(layers):
        linears |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    found |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Shape(name, config, linears, found, limit=5 * 10**9)


def deepseek(
    name: str, model_type: str, layers: int, dense: int, heads: int, experts: int, vocabulary: int, count: int | None
) -> Shape:
    """DeepSeek-V3 and what has its architecture: latent attention, experts of 2048, block-scaled fp8."""
    hidden, inner, expert, queries, keys, rope, head = 7168, 18432, 2048, 1536, 512, 64, 128
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}

    def gated(prefix: str, width: int) -> None:
        for side in ("gate_proj", "up_proj"):
            linears[f"{prefix}.{side}"] = (width, hidden)
        linears[f"{prefix}.down_proj"] = (hidden, width)

    for layer in range(layers):
        own = f"model.layers.{layer}"
        attention = f"{own}.self_attn"
        linears |= {
            f"{attention}.q_a_proj": (queries, hidden),
            f"{attention}.q_b_proj": (heads * (head + rope), queries),
            f"{attention}.kv_a_proj_with_mqa": (keys + rope, hidden),
            f"{attention}.kv_b_proj": (heads * 2 * head, keys),
            f"{attention}.o_proj": (hidden, heads * head),
        }
        others |= {
            f"{attention}.q_a_layernorm.weight": (queries,),
            f"{attention}.kv_a_layernorm.weight": (keys,),
            f"{own}.input_layernorm.weight": (hidden,),
            f"{own}.post_attention_layernorm.weight": (hidden,),
        }
        if layer < dense:
            gated(f"{own}.mlp", inner)
            continue
        others |= {
            f"{own}.mlp.gate.weight": (experts, hidden),
            f"{own}.mlp.gate.e_score_correction_bias": (experts,),
        }
        for number in range(experts):
            gated(f"{own}.mlp.experts.{number}", expert)
        gated(f"{own}.mlp.shared_experts", expert)
    others |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": queries,
        "kv_lora_rank": keys,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": head,
        "v_head_dim": head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    return Shape(name, config, linears, others, fp8=True, count=count)


MODELS: dict[str, Callable[[], Shape]] = {
    "8B": lambda: llama("Llama-3.1-8B", 4096, 14336, 32, 32),
    "70B": lambda: llama("Llama-3.1-70B", 8192, 28672, 80, 64),
    "405B": lambda: llama("Llama-3.1-405B", 16384, 53248, 126, 128),
    "671B": lambda: deepseek("DeepSeek-V3", "deepseek_v3", 61, 3, 128, 256, 129280, 163),
    "1T": lambda: deepseek("Kimi-K2", "kimi_k2", 61, 1, 64, 384, 163840, None),
}

ATTENTION = ("self_attn",)
"""What the names of the modules have that an adapter on attention alone trains."""


def write_base(folder: Path, shape: Shape) -> Path:
    """The base as files of holes. Nothing if it is there."""
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    groups = shape.files()
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _holes(folder / file, group)
        weight_map |= dict.fromkeys((name for name, _, _ in group), file)
    index = {"metadata": {"total_size": sum(map(_nbytes, shape.tensors()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    return folder


def write_adapter(folder: Path, shape: Shape, base: Path, method: str, rank: int, only: Sequence[str] = ()) -> Path:
    """An adapter of "tile" shards or a "lora", float32, on all linear weights, or those with one of `only` in their
    names."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    targets = {name: own for name, own in shape.linears.items() if not only or any(part in name for part in only)}
    tensors: list[Tensor] = []
    for name, (outputs, inputs) in targets.items():
        prefix = f"base_model.model.{name}"
        if method == "tile":
            tensors.append((f"{prefix}.miss_block", "F32", (rank, outputs)))
        else:
            tensors.append((f"{prefix}.lora_A.weight", "F32", (rank, inputs)))
            tensors.append((f"{prefix}.lora_B.weight", "F32", (outputs, rank)))
    _holes(folder / "adapter_model.safetensors", tensors)
    own: dict[str, Any] = {"peft_type": "MISS", "r": rank, "init_weights": True, "mini_r": 1}
    if method == "lora":
        own = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "fan_in_fan_out": False}
    config = own | {
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}),
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _holes(path: Path, tensors: Sequence[Tensor]) -> None:
    encoded = encode_header(tensors, {"format": "pt"})
    with path.open("wb") as file:
        file.write(encoded)
        file.truncate(len(encoded) + sum(map(_nbytes, tensors)))
