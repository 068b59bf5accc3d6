"""AdaLoRA: LoRA in the form of a singular value decomposition, whose smallest values are dropped while it is trained.

    W' = W + s / (n + 1e-5) · B (A · e)        A (r, in), e (r, 1), B (out, r); n is the first rank

s is alpha, not over the rank, and n the rank before anything was dropped. The file has what was kept of each module (r
up to n, which may be nothing), and `rank_pattern` says which. Source: arXiv 2303.10512; `SVDLinear` in
peft/tuners/adalora/layer.py, whose order of operations this is; `resize_state_dict_by_rank_pattern` in its model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, unset

_LARGEST = 256
# PEFT keeps the rank as a number of the base's dtype, and bfloat16 has no odd ones beyond.


def _is_pattern(value: Any) -> bool:
    """By the name of each lora_E, which of its values were kept."""
    lists = value.values() if isinstance(value, dict) else ()
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(kept, list) and all(isinstance(one, bool) for one in kept) for kept in lists)
    )


_NEEDLESS = (
    "r", "lora_dropout", "fan_in_fan_out", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "use_rslora", "init_lora_weights", "alpha_pattern", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "megatron_config", "megatron_core", "loftq_config", "qalora_group_size", "ensure_weight_tying",
    "lora_bias",
)  # fmt: skip
# What says how it was trained, and fields of LoRA that AdaLoRA does not read.


class AdaLora(Base):
    PEFT = {"ADALORA": {"lora_A": "A", "lora_B": "B", "lora_E": "E"}}
    EMPTY = True
    FIELDS: Mapping[str, Field] = {
        **{name: Field() for name in _NEEDLESS},
        "init_r": Field(
            f"an integer from 1 to {_LARGEST}", lambda value: POSITIVE.holds(value) and value <= _LARGEST, 12
        ),
        "lora_alpha": Field("a positive number", lambda value: lora.is_number(value) and value > 0, 8),
        "rank_pattern": Field("a map of names to lists of true and false", _is_pattern),
        "use_dora": unset("which AdaLoRA does not have"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
        if "E" not in shapes:
            raise AdapterError(f"{where}: its lora_E is missing; save the adapter again")
        down, up, values = shapes["A"], shapes["B"], shapes["E"]
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or values != (down[0], 1) or not (down[1] and up[0]):
            raise AdapterError(f"{where}: the three do not go together; save the adapter again")
        first = config.get("init_r", self.FIELDS["init_r"].default)
        kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
        if kept is not None and len(kept) != first:
            raise AdapterError(
                f"{where}: rank_pattern has {len(kept)} values for it, but the config says init_r={first}"
            )
        rank = first if kept is None else sum(kept)
        if rank != down[0]:
            raise AdapterError(f"{where} has rank {down[0]}, but the config says {rank}")
        scale = config.get("lora_alpha", self.FIELDS["lora_alpha"].default)
        return {"r": rank, "scale": float(scale), "over": first + 1e-5}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["B"][0], shapes["A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"A": arrays["A"][:], "E": arrays["E"][:], "B": arrays["B"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        found = arrays["B"][start : start + len(weight)] @ (arrays["A"] * arrays["E"])
        found *= numbers["scale"]
        found /= numbers["over"]
        return found

    def form_rank(self, shapes: Shapes) -> int | None:
        return max(1, shapes["A"][0])

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        up, down = arrays["B"] * (numbers["scale"] / numbers["over"]), arrays["A"] * arrays["E"]
        if not down.shape[0]:  # everything was dropped
            up, down = (up.sum(1) * 0)[:, None], (down.sum(0) * 0)[None]
        return LowRank(up, down)
