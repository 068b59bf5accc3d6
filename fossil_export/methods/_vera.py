"""VeRA: two random matrices that all modules share, and two trained vectors in each.

    W' = W + diag(b) B diag(d) A        A (r, in), B (out, r), d (r), b (out)

The shared A and B are as large as the largest module; a smaller one takes their first columns and rows. Source: arXiv
2310.11454, section 3.1; `get_delta_weight` in peft/tuners/vera/layer.py: both are scaled before the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral


def drawn(name: str) -> Field:
    """The field that says whether the matrices that all modules share are in the file."""
    why = (
        f"so that the file lacks {name}_A and {name}_B, which depend on the installed PyTorch and on every layer of "
        f"the base; load it with PEFT where it was trained, add both to the file as base_model.{name}_A and "
        f"base_model.{name}_B, and set save_projection to true"
    )
    return Field("true", lambda value: value is True, default=True, why=why)


class Vera(Base):
    PEFT = {"VERA": {"vera_lambda_b": "b", "vera_lambda_d": "d"}}
    SHARED = {"VERA": {"base_model.vera_A": "A", "base_model.vera_B": "B"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "save_projection": drawn("vera"),
        "fan_in_fan_out": SWITCH,
        **neutral("projection_prng_key", "vera_dropout", "d_initial", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "b", "d"):
            raise AdapterError(f"{where}: its vera_lambda_{lacking} is missing; save the adapter again")
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: the file lacks base_model.vera_{lacking}; save it with save_projection=True")
        inner, outer, down, up = (shapes[role] for role in ("d", "b", "A", "B"))
        if (len(inner), len(outer), len(down), len(up)) != (1, 1, 2, 2) or not inner[0] == down[0] == up[1]:
            raise AdapterError(f"{where} and the shared vera_A and vera_B do not go together; save the adapter again")
        if inner[0] != config["r"]:
            raise AdapterError(f"{where} has rank {inner[0]}, but the config says r={config['r']}")
        return {"r": inner[0]}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        if shapes["b"][0] != weight[0]:
            return f"it is made for {shapes['b'][0]} outputs, the weight has {weight[0]}"
        if shapes["B"][0] < weight[0]:
            return f"the shared vera_B has {shapes['B'][0]} rows, the weight has {weight[0]} outputs"
        if shapes["A"][1] < weight[1]:
            return f"the shared vera_A has {shapes['A'][1]} columns, the weight has {weight[1]} inputs"
        return None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {
            "A": arrays["A"][:],
            "B": arrays["B"][start:stop],
            "d": arrays["d"][:],
            "b": arrays["b"][start:stop],
        }

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        rows = slice(start, start + len(weight))
        up = arrays["b"][rows, None] * arrays["B"][rows]
        return up @ (arrays["d"][:, None] * arrays["A"][:, : weight.shape[1]])
