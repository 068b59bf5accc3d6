"""Models and adapters of any size that take no disk: real headers, and tensors of zeros, holes in their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fossil_export.checkpoints._dtypes import byte_count, numpy_dtype
from fossil_export.checkpoints._header import encode_header

Shapes = Mapping[str, tuple[int, ...]]


def weights_file(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """A safetensors file of `(name, dtype, shape)`, all zeros; returns its size."""
    listed = list(tensors)
    header = encode_header(listed, {"format": "pt"})
    size = len(header) + sum(byte_count(dtype, shape) for _, dtype, shape in listed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return size


def model(folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str = "BF16", limit: int = 5 << 30) -> int:
    """A base whose files have about `limit` bytes each; returns the bytes of all."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = byte_count(dtype, shape)
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, dtype, shape))
        size += own
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    total = sum(weights_file(folder / name, group) for name, group in zip(names, groups, strict=True))
    (folder / "config.json").write_text(json.dumps(config))
    index = {
        "metadata": {"total_size": total},
        "weight_map": {one[0]: n for n, g in zip(names, groups, strict=True) for one in g},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def begin_rows(folder: Path) -> None:
    """Give each row of a model's matrices a first value: DoRA divides by their lengths. That takes a page a row."""
    import os

    from fossil_export.checkpoints._header import read_header

    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            for info in read_header(path).tensors:
                if len(info.shape) != 2:
                    continue
                one = np.ones((), numpy_dtype(info.dtype)).tobytes()
                for row in range(info.shape[0]):
                    os.pwrite(file.fileno(), one, (info.offset or 0) + row * (info.nbytes // info.shape[0]))


def adapter(
    folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str = "BF16", pickled: bool = False
) -> None:
    """An adapter of PEFT's; `pickled` as adapter_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if not pickled:
        weights_file(folder / "adapter_model.safetensors", ((name, dtype, shape) for name, shape in shapes.items()))
        return
    import torch

    of = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[dtype]
    torch.save({name: torch.zeros(shape, dtype=of) for name, shape in shapes.items()}, folder / "adapter_model.bin")


class Nowhere:
    """A sink (`Sink`) that reads every page of what it gets, and keeps nothing."""

    def create(self, name: str, size: int, hash: bool = False) -> Nowhere:  # noqa: A002
        return self

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        pass

    def sha256(self, name: str) -> str:
        return ""

    def write(self, offset: int, data: np.ndarray[Any, Any]) -> None:
        data[::4096].max(initial=0)

    def close(self, done: bool) -> None:
        pass


LLAMA = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
"""Width, inner width, layers, heads, heads of keys, tokens."""


def llama(
    width: int, inner: int, layers: int, heads: int, keys: int, tokens: int
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and shapes of a Llama with untied head."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": tokens,
        "head_dim": width // heads, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        small = width // heads * keys
        shapes |= {
            f"{at}.self_attn.{one}_proj.weight": (rows, width)
            for one, rows in zip("qkvo", (width, small, small, width), strict=True)
        }
        shapes |= {f"{at}.mlp.{one}_proj.weight": (inner, width) for one in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{at}.{one}_layernorm.weight": (width,) for one in ("input", "post_attention")}
    return config, shapes | {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}


def trained(
    kind: str, rank: int, shapes: Shapes, base: Path, dtype: str = "BF16", **more: Any
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and shapes of an adapter for all layers of a model that are linear: "tile", "mini", "bat", "lora" or
    "dora"."""
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith("proj.weight")}
    modules = sorted({name.rpartition(".")[2] for name in linear})
    config: dict[str, Any] = {
        "base_model_name_or_path": str(base),
        "r": rank,
        "target_modules": modules,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    found: dict[str, tuple[int, ...]] = {}
    if kind in ("lora", "dora"):
        config |= {"peft_type": "LORA", "lora_alpha": rank, "use_dora": kind == "dora"}
        for name, (rows, width) in linear.items():
            at = f"base_model.model.{name}"
            found |= {f"{at}.lora_A.weight": (rank, width), f"{at}.lora_B.weight": (rows, rank)}
            found |= {f"{at}.lora_magnitude_vector": (rows,)} if kind == "dora" else {}
        return config | more, found
    config |= {"peft_type": "MISS", "init_weights": {"tile": True}.get(kind, kind), "mini_r": rank}
    for name, (rows, _) in linear.items():
        shape = {"tile": (rank, rows), "mini": (rank, rank), "bat": (rows // rank, rank, rank)}[kind]
        found[f"base_model.model.{name}.miss_block"] = shape
    return config | more, found
