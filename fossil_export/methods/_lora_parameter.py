"""LoRA of a parameter (`target_parameters`): a matrix, or one matrix for each of E experts.

    W'[e] = W[e] + s · B[:, e::E] A[e · r : (e + 1) · r]        A (r · E, in), B (out, r · E), W (E, out, in)

The columns of B go round the experts, and the rows of A do not. If the experts lie transposed, (E, in, out), so does
the update. Whoever places them makes a plain LoRA of every expert (`_parameters` in merging), so this one has no
formula of its own. Source: `ParamWrapper` in peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._method import Field, Numbers, Shapes


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) and one for one in value))


def _are_pairs(value: Any) -> bool:
    whole = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
    return value is None or (whole and all(type(number) is int for one in value for number in one))


class LoraParameter(Base):
    PEFT: Mapping[str, Mapping[str, str]] = {"LORA": {}}
    """Its keys are those of LoRA; which module's they are the config says (`_parameters` in adapters)."""
    FIELDS = {
        "target_parameters": Field("a list of names", _are_names),
        "layer_replication": Field("a list of pairs of layer numbers", _are_pairs),  # see merging/_replication.py
    }
    PARAMETER = ""

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
        down, up = shapes["A"], shapes["B"]
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        rank = lora.of_pattern(config, "rank_pattern", module, config["r"], where)
        if not isinstance(rank, int) or rank < 1 or down[0] % rank:
            raise AdapterError(f"{where}: has {down[0]} rows, no multiple of r={rank} of the config; save it again")
        return {**lora.scaled(config, module, rank, where), "experts": down[0] // rank}

    def dimensions(self, shapes: Shapes) -> int:
        return 3
