"""LoRAPrune: LoRA, and a mask of the layer's outputs.

    W' = M (W + s · B A)        M = diag(mask), mask (out)

Source: `Linear.forward` in loraprune/lora.py (github.com/aim-uofa/LoRAPrune; arXiv 2305.18403, section 3). A layer's
bias is masked as well, so that layers with one are refused. The sum is float32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import FIELDS, Lora
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes

_LORA = Lora()


class LoraPruned(Base):
    PEFT = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B", "lora_mask": "mask"}}
    FIELDS = FIELDS
    COMBINES: Combination = "alone"
    MASKS_BIAS = True

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if "mask" not in shapes:
            return None
        found = _LORA.read(config, module, {role: shapes[role] for role in shapes if role != "mask"}, where)
        if len(shapes["A"]) != 2 or math.prod(shapes["mask"]) != shapes["B"][0]:
            raise AdapterError(f"{where}: the mask does not go with the two; save the adapter again")
        return found

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return _LORA.mismatch(shapes, numbers, weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**_LORA.part(arrays, start, stop), "mask": arrays["mask"][:].reshape(-1)[start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        mask = arrays["mask"].reshape(-1)[start : start + len(weight), None]
        return (weight + _LORA.update(weight, arrays, numbers, start)) * mask - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight += _LORA.update(weight, arrays, numbers, start)
        weight *= arrays["mask"].reshape(-1)[start : start + len(weight), None]
