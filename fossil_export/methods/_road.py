"""RoAd: pairs of outputs turned and scaled.

    y'[k] = c[k] y[k] - d[k] y[k + h],  y'[k + h] = c[k + h] y[k + h] + d[k + h] y[k]        k < h, h = group_size / 2

in each group of outputs; W and the bias change alike. With α and θ as they are stored c = α cos θ and d = α sin θ: for
road_2 one for each output, for road_1 one for both of a pair, for road_4 those of a group twice, first c's, then d's.
Source: arXiv 2409.00119, section 3; `_prepare_cols` and `_apply_road` in peft/tuners/road/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes
from fossil_export.methods._rotation import like, wide

VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Values of α, and of θ, for each pair of outputs."""


class Road(Base):
    """One of the variants: what rows need of the tensors differs."""

    PEFT: Mapping[str, Mapping[str, str]] = {"ROAD": {"road_theta": "theta", "road_alpha": "alpha"}}
    COMBINES: Combination = "order"
    FIELDS = {
        "variant": Field(" or ".join(VARIANTS), lambda value: value in VARIANTS, "road_1"),
        "group_size": Field("an even number", lambda value: POSITIVE.holds(value) and value % 2 == 0, 64),
        "init_weights": Field(),
    }

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if config.get("variant", "road_1") != self.variant:
            return None
        if lacking := needs(shapes, "theta", "alpha"):
            raise AdapterError(f"{where}: its {lacking} is missing; save the adapter again")
        group = config.get("group_size", 64)
        if shapes["theta"] != shapes["alpha"] or len(shapes["theta"]) != 1 or self._outputs(shapes) % group:
            raise AdapterError(f"{where} does not go with {self.variant} and group_size={group}; mend the config")
        return {"group": group, "block_rows": group}

    def _outputs(self, shapes: Shapes) -> int:
        return shapes["theta"][0] * 2 // VARIANTS[self.variant]

    def beside(self, numbers: Numbers) -> str | None:
        return f"{self.variant}_bias"

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = self._outputs(shapes)
        fits = found == weight[0] and shapes["theta"][0] * 2 == found * VARIANTS[self.variant]
        return None if fits else f"it is made for {found} outputs, the weight has {weight[0]}"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        values = VARIANTS[self.variant]
        return {role: array[start * values // 2 : stop * values // 2] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return self._turned(weight, arrays, numbers, start) - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight[:] = self._turned(weight, arrays, numbers, start)

    def _turned(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        half = numbers["group"] // 2
        here = self.part(arrays, start, start + len(weight))
        alpha, theta = (wide(here[role]).reshape(-1, VARIANTS[self.variant], half) for role in ("alpha", "theta"))
        first, second = alpha * _cos(theta), alpha * _cos(theta, sine=True)
        if self.variant == "road_4":
            first, second = first[:, :2], second[:, 2:]
        own, other = like(first, weight)[..., None], like(second, weight)[..., None]
        pairs = weight.reshape(-1, 2, half, weight.shape[1])
        found = pairs * own
        found[:, 0] -= pairs[:, 1] * other[:, 0]
        found[:, 1] += pairs[:, 0] * other[:, -1]
        return found.reshape(weight.shape)


class RoadBias(Road):
    """The bias of such a module."""

    PEFT: Mapping[str, Mapping[str, str]] = {}
    PARAMETER = "bias"

    def dimensions(self, shapes: Shapes) -> int | None:
        return 1

    def beside(self, numbers: Numbers) -> str | None:
        return None


def _cos(angles: Any, sine: bool = False) -> Any:
    if hasattr(angles, "requires_grad"):
        return angles.sin() if sine else angles.cos()
    import numpy as np

    return np.sin(angles) if sine else np.cos(angles)
