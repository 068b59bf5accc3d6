"""LN tuning: whole norms, which take the place of the base's.

    W' = w,  b' = c        w and c as they are stored

Source: arXiv 2312.11420; peft/tuners/ln_tuning/layer.py, which trains a copy of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes


class LnTuning(Base):
    PEFT: Mapping[str, Mapping[str, str]] = {"LN_TUNING": {"ln_tuning_layers.weight": "w"}}
    COMBINES: Combination = "alone"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if not shapes["w"]:
            raise AdapterError(f"{where} is a single number; save the adapter again")
        return {}

    def dimensions(self, shapes: Shapes) -> int | None:
        return len(shapes["w"])

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = shapes["w"][0], math.prod(shapes["w"][1:])
        return None if found == weight else f"it has the shape {list(found)}, not {list(weight)}"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"w": arrays["w"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["w"][start : start + len(weight)].reshape(weight.shape) - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight[:] = arrays["w"][start : start + len(weight)].reshape(weight.shape)


class LnTuningBias(LnTuning):
    PEFT: Mapping[str, Mapping[str, str]] = {"LN_TUNING": {"ln_tuning_layers.bias": "w"}}
    PARAMETER = "bias"
