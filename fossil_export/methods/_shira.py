"""SHiRA: trained values at some places of the weight.

    W'[i[0, k], i[1, k]] = W[…] + v[k]        v (n), i (2, n): row and column, which the file has beside the values

Source: arXiv 2406.13175, section 3; `get_delta_weight` in peft/tuners/shira/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import scattered, whole
from fossil_export.methods._base import WHOLE, Base, needs
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral


class Shira(Base):
    PEFT = {"SHIRA": {"shira_weight": "v", "shira_indices": "#i"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "fan_in_fan_out": SWITCH,
        **neutral("mask_type", "random_seed", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "v", "#i"):
            name = {"v": "shira_weight", "#i": "shira_indices"}.get(lacking, lacking)
            raise AdapterError(f"{where}: its {name} is missing; save the adapter again")
        if len(shapes["v"]) != 1 or shapes["#i"] != (2, *shapes["v"]):
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        return {"r": config["r"]}

    def block_rows(self, shapes: Shapes) -> int:
        return WHOLE

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found, wanted = shapes["v"][0], numbers["r"] * sum(weight)
        return None if found == wanted else f"it has {found} values, r={numbers['r']} makes {wanted} for {list(weight)}"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        row, column = whole(arrays["#i"])
        inside(row, len(weight), "shira_indices")
        inside(column, weight.shape[1], "shira_indices")
        return scattered(arrays["v"], row * weight.shape[1] + column, weight)


def inside(places: Any, count: int, name: str) -> None:
    """Raise AdapterError unless all of `places` are from 0 to below `count`."""
    if bool((places < 0).any()) or bool((places >= count).any()):
        raise AdapterError(f"some {name} of a module are not in its weight; the adapter is damaged, save it again")
