"""BEFT: a trained vector beside the layer's own bias.

    b' = b + c        c (1, out), b (out)

Source: `forward` in peft/tuners/beft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import unlike
from fossil_export.methods._method import Arrays, Numbers, Shapes, neutral


class Beft(Base):
    PEFT = {"BEFT": {"beft_bias": "c"}}
    FIELDS = neutral("init_weights")
    PARAMETER = "bias"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if len(shapes["c"]) != 2 or shapes["c"][0] != 1:
            raise AdapterError(f"{where} should be (1, out); save the adapter again")
        return {}

    def dimensions(self, shapes: Shapes) -> int:
        return 1

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["c"][1], 1), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"c": arrays["c"][:, start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["c"][:, start : start + len(weight)].T
