"""The bias of LoRA's B (`lora_bias`), which is added to the layer's own.

    b' = b + s · c        c (out), b (out)

Source: `Linear.merge` in peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base
from fossil_export.methods._method import Arrays, Numbers, Shapes


class LoraBias(Base):
    PEFT = {"LORA": {"lora_B.bias": "c"}}
    FIELDS = lora.FIELDS
    PARAMETER = "bias"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if len(shapes["c"]) != 1:
            raise AdapterError(f"{where} is no vector; save the adapter again")
        if not config.get("lora_bias"):
            raise AdapterError(f"{where} is there, but the config does not say lora_bias; mend the config")
        rank = lora.of_pattern(config, "rank_pattern", module, config["r"], where)
        return lora.scaled(config, module, rank, where)

    def dimensions(self, shapes: Shapes) -> int:
        return 1

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["c"][0], 1), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"c": arrays["c"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["c"][start : start + len(weight), None] * numbers["scale"]
