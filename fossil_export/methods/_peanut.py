"""PEANuT: the update is what a small network makes of the weight.

    W' = W + s · (B g(σ(A W)))        A (r, out), B (out, r), W (out, in)

g is nothing (depth 0), or d encoders E and d decoders D (r, r) with the hidden values added back in the reverse order:
h ← σ(E h) for each encoder, then h ← σ(D h) + (what the encoder of the same place got) for each decoder. Each column
of W goes through it on its own, so that all rows are needed at once. All of it is float64: the layers multiply
float32's error, by more than the check could bear. Source: arXiv 2410.01870, section 3; `_compute_delta_weight` in
peft/tuners/peanut/layer.py, which works on Wᵀ (in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._activations import ACTIVATIONS
from fossil_export.methods._arrays import widest
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import NUMBER
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes

DEEPEST = 32
"""Encoders that are known by name; a deeper network is refused."""


def _keys() -> dict[str, str]:
    found = {"peanut_A.weight": "A", "peanut_B.weight": "B"}
    for place in range(DEEPEST):
        found[f"peanut_encoders.{place}.weight"] = f"E{place}"
        found[f"peanut_decoders.{place}.weight"] = f"D{place}"
    return found


def _is_depth(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= DEEPEST


class Peanut(Base):
    PEFT = {"PEANUT": _keys()}
    COMBINES: Combination = "alone"  # PEFT gives each of several the base's weight
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "depth": Field(f"a whole number from 0 to {DEEPEST}", _is_depth, default=0),
        "act_fn": Field(f"one of {', '.join(ACTIVATIONS)}", lambda value: value in tuple(ACTIVATIONS), default="relu"),
        "scaling": NUMBER,
        "init_weights": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        depth = config.get("depth", 0)
        pairs = [f"{side}{place}" for place in range(depth) for side in "ED"]
        if lacking := needs(shapes, "A", "B", *pairs):
            raise AdapterError(f"{where}: its {lacking} is missing, with depth={depth}; save the adapter again")
        if len(shapes) > 2 + 2 * depth:
            raise AdapterError(f"{where} has more layers than depth={depth} of the config; mend the config")
        rank = shapes["A"][0]
        square = all(shapes[pair] == (rank, rank) for pair in pairs)
        if len(shapes["A"]) != 2 or shapes["B"] != shapes["A"][::-1] or not square:
            raise AdapterError(f"{where}: these do not go together; save the adapter again")
        if rank != config["r"]:
            raise AdapterError(f"{where} has rank {rank}, but the config says r={config['r']}; mend the config")
        given = {"act_fn": config.get("act_fn", "relu"), "scale": config.get("scaling", 1.0)}
        return {"r": rank, "depth": depth, **given}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["A"][1]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        outputs = shapes["B"][0]
        return None if outputs == weight[0] else f"it is made for {outputs} outputs, the weight has {weight[0]}"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        bend = ACTIVATIONS[numbers["act_fn"]]
        depth = numbers["depth"]
        weight, arrays = widest(weight), {role: widest(array) for role, array in arrays.items()}
        hidden = bend(weight.T @ arrays["A"].T)
        kept = []
        for place in range(depth):
            kept.append(hidden)
            hidden = bend(hidden @ arrays[f"E{place}"].T)
        for place in range(depth):
            hidden = bend(hidden @ arrays[f"D{place}"].T) + kept[depth - 1 - place]
        return ((hidden @ arrays["B"].T) * numbers["scale"]).T
