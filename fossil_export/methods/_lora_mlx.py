"""LoRA as MLX trains it, whose two matrices lie the other way round.

    linear layer    W' = W + s · (a b)ᵀ        a (in, r), b (r, out)
    embedding       W' = W + s · a b           a (tokens, r), b (r, dims), W (tokens, dims)

Source: `LoRALinear.__call__` and `LoRAEmbedding.__call__` in mlx_lm/tuner/lora.py; `scale` of the config is s itself.
The order of operations is that of PEFT's LoRA: the product first, then s, then the sum, in float32, rounded once.
(MLX's own `fuse` rounds the update to the weight's dtype before the sum.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import Arrays, Numbers, Shapes

_EMBEDDINGS = frozenset(
    {"embed_tokens", "embeddings", "embedding", "embed_in", "word_embeddings", "tok_embeddings", "wte", "wpe"}
)
# What MLX's models call them. Their matrices are told from those of a linear layer by nothing else.


class LoraMlx(Base):
    PEFT = {"MLX": {"lora_a": "a", "lora_b": "b"}}

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        return None if is_embedding(module) else read_pair(config, shapes, where)

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["b"][1], shapes["a"][0]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"a": arrays["a"][:], "b": arrays["b"][:, start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        up = arrays["b"][:, start : start + len(weight)]
        return lora.product(turned(up), turned(arrays["a"]), numbers["scale"])

    def form_rank(self, shapes: Shapes) -> int | None:
        return shapes["a"][1]

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        return LowRank(turned(arrays["b"]) * numbers["scale"], turned(arrays["a"]))


class LoraMlxEmbedding(Base):
    PEFT = LoraMlx.PEFT

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        return read_pair(config, shapes, where) if is_embedding(module) else None

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["a"][0], shapes["b"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"a": arrays["a"][start:stop], "b": arrays["b"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return lora.product(arrays["a"][start : start + len(weight)], arrays["b"], numbers["scale"])


def is_embedding(module: str) -> bool:
    """Whether MLX's models have an embedding of this name."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def read_pair(config: Mapping[str, Any], shapes: Shapes, where: str) -> Numbers:
    """The rank and the scale; raises AdapterError for matrices that do not go together."""
    if lacking := needs(shapes, "a", "b"):
        raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
    down, up = shapes["a"], shapes["b"]
    if len(down) != 2 or len(up) != 2 or up[0] != down[1]:
        raise AdapterError(f"{where}: the two do not go together; save the adapter again")
    if down[1] != config["r"]:
        raise AdapterError(f"{where} has rank {down[1]}, but the config says rank {config['r']}")
    return {"r": down[1], "scale": float(config["scale"])}


def turned(matrix: Any) -> Any:
    """Its transpose, laid out as PEFT stores it: the bits of a product depend on that."""
    if hasattr(matrix, "device") and hasattr(matrix, "contiguous"):
        return matrix.T.contiguous()
    import numpy as np

    return np.ascontiguousarray(matrix.T)
