"""Uni-LoRA: a LoRA whose values are all taken from one trained vector.

    W' = W + B A,  A = θ[i] ⊙ p (r, in),  B = θ[j] ⊙ q (out, r)

θ is shared by all modules; the places i and j and the factors p and q are in the file if it was saved with them.
Source: arXiv 2506.00799, section 3; `_get_lora_matrices` in peft/tuners/unilora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import whole
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral
from fossil_export.methods._shira import inside


class Unilora(Base):
    PEFT = {
        "UNILORA": {
            "unilora_indices_A": "#A",
            "unilora_indices_B": "#B",
            "unilora_scales_A": "p",
            "unilora_scales_B": "q",
        }
    }
    SHARED = {"UNILORA": {"base_model.unilora_theta_d": "t"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "save_indices": Field(
            "true",
            lambda value: value is True,
            default=False,
            why=(
                "so that the file does not say which values a module takes; load it with PEFT where it was trained, "
                "set save_indices of its config to true, and save it again"
            ),
        ),
        "fan_in_fan_out": SWITCH,
        "theta_d_length": POSITIVE,
        **neutral("proj_seed", "unilora_dropout", "init_theta_d_bound", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "#A", "#B", "p", "q"):
            names = lacking.replace("#", "indices_").replace("p", "scales_A").replace("q", "scales_B")
            raise AdapterError(f"{where}: its {names} is missing; save the adapter again")
        if "t" not in shapes:
            raise AdapterError(f"{where}: the file lacks base_model.unilora_theta_d; save the adapter again")
        down, up = shapes["#A"], shapes["#B"]
        fits = len(down) == 2 == len(up) and len(shapes["t"]) == 1 and down[0] == up[1]
        if not fits or shapes["p"] != down or shapes["q"] != up:
            raise AdapterError(f"{where}: these do not go together; save the adapter again")
        if shapes["t"][0] != config["theta_d_length"]:
            said = config["theta_d_length"]
            raise AdapterError(f"{where}: unilora_theta_d has {shapes['t'][0]} values, but theta_d_length is {said}")
        if down[0] != config["r"]:
            raise AdapterError(f"{where} has rank {down[0]}, but the config says r={config['r']}")
        return {"r": down[0]}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["#B"][0], shapes["#A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        rows = {role: arrays[role][start:stop] for role in ("#B", "q")}
        return {**rows, **{role: arrays[role][:] for role in ("#A", "p", "t")}}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        places = {role: whole(arrays[role]) for role in ("#A", "#B")}
        for found in places.values():
            inside(found, len(arrays["t"]), "unilora_indices")
        rows = slice(start, start + len(weight))
        up = arrays["t"][places["#B"][rows]] * arrays["q"][rows]
        return up @ (arrays["t"][places["#A"]] * arrays["p"])
