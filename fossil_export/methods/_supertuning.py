"""Supertuning: trained values at some places of the weight, and a LoRA beside them if it has a rank ("Supra").

    W'[i[k] div in, i[k] mod in] = W[…] + v[k];  with r above it W' + s · B A, s = alpha / r

    v (n), i (n), A (r, in), B (out, r); alpha is 2 r if the config has none

Source: `forward` and `merge` in peft/tuners/supertuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import scattered, whole
from fossil_export.methods._base import WHOLE, Base, needs
from fossil_export.methods._lora import is_number, product, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral
from fossil_export.methods._shira import inside


class Supertuning(Base):
    PEFT = {
        "SUPERTUNING": {
            "supertuning_values": "v",
            "supertuning_indices": "#i",
            "supertuning_lora_A.weight": "A",
            "supertuning_lora_B.weight": "B",
        }
    }
    FIELDS: Mapping[str, Field] = {
        "r": Field("a positive integer or nothing", lambda value: value is None or POSITIVE.holds(value)),
        "lora_alpha": Field("a number or nothing", lambda value: value is None or is_number(value)),
        "save_precomputed_indices": Field(
            "true",
            lambda value: value is True,
            default=True,
            why="so that the file does not say which weights it changes; save it with save_precomputed_indices=True",
        ),
        **neutral("sparsity", "select_top", "lora_dropout", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        rank = config.get("r")
        if lacking := needs(shapes, "v", "#i", *(("A", "B") if rank else ())):
            raise AdapterError(f"{where}: its {lacking.replace('#i', 'indices')} is missing; save the adapter again")
        if len(shapes["v"]) != 1 or shapes["#i"] != shapes["v"] or (not rank and len(shapes) > 2):
            raise AdapterError(f"{where} and r={rank} of the config do not go together; save the adapter again")
        if not rank:
            return {}
        if len(shapes["A"]) != 2 or len(shapes["B"]) != 2 or not rank == shapes["A"][0] == shapes["B"][1]:
            raise AdapterError(f"{where} and r={rank} of the config do not go together; save the adapter again")
        alpha = config.get("lora_alpha")
        return {"r": rank, "share": (2 * rank if alpha is None else alpha) / rank}

    def block_rows(self, shapes: Shapes) -> int:
        return WHOLE

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        if shapes["v"][0] > weight[0] * weight[1]:
            return f"it has {shapes['v'][0]} values, more than the weight"
        return unlike((shapes["B"][0], shapes["A"][1]), weight) if "A" in shapes else None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        places = whole(arrays["#i"])
        inside(places, len(weight) * weight.shape[1], "supertuning_indices")
        found = scattered(arrays["v"], places, weight)
        if "A" in arrays:
            found += product(arrays["B"], arrays["A"], numbers["share"])
        return found
