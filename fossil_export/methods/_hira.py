"""HiRA: the weight times a product of two thin matrices, element by element.

    W' = W + W ⊙ (B A)        A (r, in), B (out, r);  of an embedding W + W ⊙ (B A)ᵀ with A (r, tokens), B (dims, r)

Source: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation" (ICLR 2025), section 3; `forward` and `_merge` in
peft/tuners/hira/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import PATTERN, SWITCH, of_pattern, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes, neutral

FIELDS: Mapping[str, Field] = {
    "r": POSITIVE,
    "rank_pattern": PATTERN,
    "fan_in_fan_out": SWITCH,
    **neutral("hira_dropout", "init_weights"),
}


class Hira(Base):
    PEFT = {"HIRA": {"hira_A": "A", "hira_B": "B"}}
    COMBINES: Combination = "alone"  # PEFT multiplies the base's weight by the sum of several
    FIELDS = FIELDS

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its other half {lacking} is missing; save the adapter again")
        down, up = shapes["A"], shapes["B"]
        if len(down) != 2 or len(up) != 2:
            raise AdapterError(f"{where} is of a convolution, which fossil-export does not merge; merge it with PEFT")
        if up[1] != down[0]:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        said = of_pattern(config, "rank_pattern", module, config["r"], where, down[0])
        if down[0] not in (said, config["r"]):  # PEFT up to 0.21 gives every module the rank r
            raise AdapterError(f"{where} has rank {down[0]}, but the config says r={said}; mend the config")
        return {"r": down[0]}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["B"][0], shapes["A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"A": arrays["A"][:], "B": arrays["B"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return weight * (arrays["B"][start : start + len(weight)] @ arrays["A"])


class HiraEmbedding(Hira):
    PEFT = {"HIRA": {"hira_embedding_A": "A", "hira_embedding_B": "B"}}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["A"][1], shapes["B"][0]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"A": arrays["A"][:, start:stop], "B": arrays["B"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return weight * (arrays["B"] @ arrays["A"][:, start : start + len(weight)]).T
