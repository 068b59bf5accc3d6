"""PVeRA: VeRA with the mean of a distribution as its update.

    W' = W + diag(b) B diag(d₁) A₁        A (2r, in), B (out, r), d (2r), b (out); A₁ and d₁ are their first r rows

The other halves are the variances, which training draws from. Source: `get_delta_weight` and `_reparametrize` in
peft/tuners/pvera/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import needs
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral, unset
from fossil_export.methods._vera import Vera, drawn


class Pvera(Vera):
    PEFT = {"PVERA": {"pvera_lambda_b": "b", "pvera_lambda_d": "d"}}
    SHARED = {"PVERA": {"base_model.pvera_A": "A", "base_model.pvera_B": "B"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "save_projection": drawn("pvera"),
        "fan_in_fan_out": SWITCH,
        "sample_at_inference": unset("so that its update is drawn anew in each pass; set it to false for the mean"),
        **neutral("projection_prng_key", "pvera_dropout", "d_initial", "init_weights", "generator_seed"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "b", "d"):
            raise AdapterError(f"{where}: its pvera_lambda_{lacking} is missing; save the adapter again")
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: the file lacks base_model.pvera_{lacking}; save it with save_projection=True")
        inner, outer, down, up = (shapes[role] for role in ("d", "b", "A", "B"))
        if (len(inner), len(outer), len(down), len(up)) != (1, 1, 2, 2) or not inner[0] == down[0] == 2 * up[1]:
            raise AdapterError(f"{where} and the shared pvera_A and pvera_B do not go together; save the adapter again")
        if up[1] != config["r"]:
            raise AdapterError(f"{where} has rank {up[1]}, but the config says r={config['r']}")
        return {"r": up[1]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        rank = numbers["r"]
        return super().update(weight, {**arrays, "A": arrays["A"][:rank], "d": arrays["d"][:rank]}, numbers, start)
