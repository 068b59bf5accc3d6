"""HRA: the inputs mirrored in a row of planes.

    W' = W H₁ H₂ … H_r        H = I - 2 u uᵀ, u a column of the stored (in, r), divided by its length

With `apply_GS` the columns are made orthogonal first, one after another (Gram and Schmidt). Either way the product is
I - U T Uᵀ with an upper triangle T (r, r), which is how it is computed here: W - ((W U) T) Uᵀ, all but the last product
in float64. Convolutions are refused, as BOFT's. Sources: arXiv 2405.17484; `get_delta_weight` in
peft/tuners/hra/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes
from fossil_export.methods._rotation import identity, like, wide

_NEVER = 2.0**-20
"""Share of a column's length that must be left of it by those before it; of less, float32 tells no direction."""


class Hra(Base):
    PEFT = {"HRA": {"hra_u": "u"}}
    COMBINES: Combination = "order"
    FIELDS = {
        "r": Field(POSITIVE.expected, POSITIVE.holds, 8),
        "apply_GS": SWITCH,
        "init_weights": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if len(shapes["u"]) != 2 or shapes["u"][1] != config.get("r", 8):
            raise AdapterError(f"{where} does not go with r={config.get('r', 8)} of the config; mend the config")
        return {"r": shapes["u"][1], "orthogonal": bool(config.get("apply_GS"))}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = shapes["u"][0]
        return f"it is made for {found} inputs, the weight has {weight[1]}" if found != weight[1] else None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"u": arrays["u"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        planes, mixing = mirrors(arrays["u"], numbers["orthogonal"])
        return like(-(wide(weight) @ planes @ mixing), weight) @ like(planes, weight).T


def mirrors(stored: Any, orthogonal: bool) -> tuple[Any, Any]:
    """U (in, r), of columns of length 1, and T (r, r) in float64."""
    planes = wide(stored)
    lengths = (planes * planes).sum(0) ** 0.5
    planes = planes / lengths
    rank = planes.shape[1]
    mixing = 2 * identity(rank, planes)
    for number in range(1, rank):
        before = planes[:, :number]
        if orthogonal:
            left = planes[:, number]
            for other in range(number):
                left = left - (planes[:, other] @ left) * planes[:, other]
            length = (left * left).sum() ** 0.5
            planes[:, number] = left / (length if length > _NEVER else 0 * length)
        else:
            mixing[:number, number] = -2 * (mixing[:number, :number] @ (before.T @ planes[:, number]))
    return planes, mixing
