"""DeLoRA: a product of two thin matrices whose columns and rows have a fixed length together.

    W' = W + B diag(λ / (r |A_k| |B^k|)) A diag(w)        A (r, in), B (out, r), λ (1), w (in)

|A_k| is the length of row k of A and |B^k| of column k of B, neither below 1e-4; w is what the base's columns measured
when training began. The lengths need all rows of B at once. Source: arXiv 2503.18225, section 3; `forward` in
peft/tuners/delora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import narrowed, widest
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import PATTERN, of_pattern, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral

SHORTEST = 1e-4


class Delora(Base):
    PEFT = {"DELORA": {"delora_A": "A", "delora_B": "B", "delora_lambda": "l", "delora_w_norm": "w"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "rank_pattern": PATTERN,
        **neutral("delora_lambda", "lambda_pattern", "module_dropout", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B", "l", "w"):
            raise AdapterError(f"{where}: {lacking} of A, B, l (lambda) and w (w_norm) is missing; save it again")
        down, up = shapes["A"], shapes["B"]
        fits = len(down) == 2 == len(up) and up[1] == down[0] and shapes["w"] == down[1:]
        if not fits or shapes["l"] != (1,):
            raise AdapterError(f"{where}: these do not go together; save the adapter again")
        said = of_pattern(config, "rank_pattern", module, config["r"], where, down[0])
        if said != down[0]:
            raise AdapterError(f"{where} has rank {down[0]}, but the config says r={said}; mend the config")
        return {"r": down[0]}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["B"][0]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["B"][0], shapes["A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["B"] @ narrowed(_core(arrays), weight)


def _core(arrays: Arrays) -> Any:
    """diag(…) A diag(w), in float64."""
    down, up = widest(arrays["A"]), widest(arrays["B"])
    lengths = ((down * down).sum(1) ** 0.5).clip(SHORTEST) * ((up * up).sum(0) ** 0.5).clip(SHORTEST)
    share = widest(arrays["l"]) / len(down) / lengths
    return share[:, None] * down * widest(arrays["w"])
