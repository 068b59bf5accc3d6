"""LoRA of an embedding.

    W' = W + s · (B A)ᵀ        A (r, tokens), B (dims, r), W (tokens, dims)

Source: `Embedding.get_delta_weight` in peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import Arrays, Numbers, Shapes


class LoraEmbedding(Base):
    PEFT = {"LORA": {"lora_embedding_A": "A", "lora_embedding_B": "B"}}
    FIELDS = lora.FIELDS

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_embedding_{lacking} is missing; save the adapter again")
        if "m" not in shapes and config.get("use_dora"):
            raise AdapterError(lora.LOST.format(where=where))
        down, up = shapes["A"], shapes["B"]
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        return lora.scaled(config, module, down[0], where)

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["A"][1], shapes["B"][0]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"A": arrays["A"][:, start:stop], "B": arrays["B"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return lora.product(arrays["B"], arrays["A"][:, start : start + len(weight)], numbers["scale"]).T

    def form_rank(self, shapes: Shapes) -> int | None:
        return None  # as a matrix it is one, but no linear layer reads it

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        return None
