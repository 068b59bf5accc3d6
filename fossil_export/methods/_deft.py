"""DEFT: the weight without a subspace, and something trained in its place.

    W' = W + Q (s · R - Pᵀ W)        R (r, in); with para W' = W - Q Pᵀ W

Q (out, r) is the trained matrix and P its positive part (decomposition "relu"), or both are the Q of its QR
decomposition ("qr"); s = alpha / r, or 1 without alpha. Every column of W is looked at as a whole, so that all rows are
needed at once, and all of it is float64. Source: `_project` and `forward` in peft/tuners/deft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import is_torch, widest
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH, is_number, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes, neutral


class Deft(Base):
    PEFT = {"DEFT": {"deft_P": "P", "deft_R": "R"}}
    COMBINES: Combination = "alone"  # PEFT gives each of several the base's weight
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "alpha": Field("a number", lambda value: value is None or is_number(value)),
        "decomposition_method": Field("relu or qr", lambda value: value in ("relu", "qr"), "relu"),
        "para": SWITCH,
        "fan_in_fan_out": SWITCH,
        **neutral("init_scale", "deft_dropout", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        para = bool(config.get("para"))
        if (lacking := needs(shapes, "P", *(() if para else ("R",)))) or (para and "R" in shapes):
            problem = f"its deft_{lacking} is missing" if lacking else "its deft_R is there"
            raise AdapterError(f"{where}: {problem}, with para={para}; save the adapter again")
        rank = shapes["P"][-1]
        if len(shapes["P"]) != 2 or (not para and (len(shapes["R"]) != 2 or shapes["R"][0] != rank)):
            raise AdapterError(f"{where}: these do not go together; save the adapter again")
        if rank != min(config["r"], shapes["P"][0]):
            raise AdapterError(f"{where} has rank {rank}, but the config says r={config['r']}; mend the config")
        scale = config["alpha"] / rank if config.get("alpha") else 1.0
        return {"r": rank, "way": config.get("decomposition_method", "relu"), "inject": scale}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["P"][0]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["P"][0], shapes["R"][1] if "R" in shapes else weight[1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        left = widest(arrays["P"])
        right = left.clip(0)
        if numbers["way"] == "qr":
            left = right = _orthogonal(left)
        inner = -(right.T @ widest(weight))
        if "R" in arrays:
            inner = inner + widest(arrays["R"]) * numbers["inject"]
        return left @ inner


def _orthogonal(matrix: Any) -> Any:
    if is_torch(matrix):
        import torch

        return torch.linalg.qr(matrix)[0]
    import numpy as np

    return np.linalg.qr(matrix)[0]
