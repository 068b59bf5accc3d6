"""OFT: the inputs turned by orthogonal blocks.

    W' = W diag(R₁, R₂, …)ᵀ        of an embedding W' = W diag(R₁, R₂, …)

R is made of a skew-symmetric Q (b, b), whose upper triangle is stored: by Cayley's transform (I - Q)(I + Q)⁻¹, or with
`use_cayley_neumann` by the first terms of its series,

    R = I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹        for n = num_cayley_neumann_terms; I + 2Q + 2Q² + Q³ for 3, I + 2Q for 2

With `coft` Q is first shrunk to the norm eps / √blocks, if it is larger (eps in single precision). With `block_share`
all blocks are one. Convolutions are refused: PEFT turns patches of the input and adds them up where they overlap, which
no weight of the same size does. Sources: arXiv 2306.07280; for the series arXiv 2506.19847; `OFTRotationModule` in
peft/tuners/oft/layer.py, as it is since PEFT 0.18.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import FIELDS, SWITCH
from fossil_export.methods._method import Arrays, Combination, Field, Numbers, Shapes
from fossil_export.methods._rotation import by_blocks, cayley, identity, like, skew, wide

_AGAIN = "convert or merge it with the PEFT that saved it, or train it again"

_COUNT = Field("an integer that is not negative", lambda value: type(value) is int and value >= 0, 0)


class Oft(Base):
    PEFT: Mapping[str, Mapping[str, str]] = {
        "OFT": {"oft_R.weight": "Q", "oft_R": "first", "oft_r": "first", "oft_s": "second"}
    }
    COMBINES: Combination = "alone"  # PEFT runs several the other way round than it merges them
    FIELDS = {
        "r": _COUNT,
        "oft_block_size": Field(_COUNT.expected, _COUNT.holds, 32),
        "fan_in_fan_out": SWITCH,
        "coft": SWITCH,
        "eps": Field(FIELDS["lora_alpha"].expected, FIELDS["lora_alpha"].holds, 6e-5),
        "block_share": SWITCH,
        "use_cayley_neumann": SWITCH,
        "num_cayley_neumann_terms": Field(_COUNT.expected, _COUNT.holds, 5),
        "module_dropout": Field(),
        "init_weights": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if shapes.keys() != {"Q"} or not {"oft_block_size", "use_cayley_neumann"} <= config.keys():
            raise AdapterError(f"{where}: is of an older OFT, which PEFT computed in other ways; {_AGAIN}")
        blocks, size = (shapes["Q"][0], _size(shapes)) if shapes["Q"] else (0, 0)
        if len(shapes["Q"]) != 2 or size * (size - 1) // 2 != shapes["Q"][1]:
            raise AdapterError(f"{where}: is no upper triangle of a matrix; save the adapter again")
        shared = bool(config.get("block_share"))
        if shared and blocks != 1:
            raise AdapterError(f"{where} has {blocks} blocks, but the config says block_share; mend the config")
        series = bool(config.get("use_cayley_neumann"))
        if series and _version(config) < (0, 18):
            raise AdapterError(
                f"{where}: use_cayley_neumann meant something else before PEFT 0.18, and the config does not say that "
                f"this is newer (peft_version); {_AGAIN}"
            )
        return {
            "r": blocks,
            "shared": shared,
            "terms": config.get("num_cayley_neumann_terms", 5) if series else None,
            "eps": config.get("eps", 6e-5) if config.get("coft") else None,
            # Rotations are made anew for each lot of rows: fewer would take longer than the product.
            "block_rows": size,
        }

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        size = _size(shapes)
        if numbers["shared"]:
            return f"its blocks of {size} do not divide the weight's {weight[1]} inputs" if weight[1] % size else None
        found = shapes["Q"][0] * size
        return f"it is made for {found} inputs, the weight has {weight[1]}" if found != weight[1] else None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"Q": arrays["Q"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return self._turned(weight, arrays, numbers) - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight[:] = self._turned(weight, arrays, numbers)

    def _turned(self, weight: Any, arrays: Arrays, numbers: Numbers) -> Any:
        return by_blocks(weight, like(rotations(arrays["Q"], numbers).swapaxes(1, 2), weight))


class OftEmbedding(Oft):
    """The outputs of an embedding turned."""

    PEFT = {"OFT": {"oft_embedding_R.weight": "Q"}}

    def _turned(self, weight: Any, arrays: Arrays, numbers: Numbers) -> Any:
        return by_blocks(weight, like(rotations(arrays["Q"], numbers), weight))


def rotations(vectors: Any, numbers: Numbers) -> Any:
    """R (blocks, b, b) in float64."""
    count, values = vectors.shape
    size = _size({"Q": (count, values)})
    made = wide(vectors)
    if numbers["eps"] is not None:
        most = _single(numbers["eps"], count)
        norms = (2 * (made * made).sum(-1)) ** 0.5
        made = made * (most / norms.clip(min=most))[:, None]
    turns = skew(made, size)
    terms = numbers["terms"]
    if terms is None:
        return cayley(turns)
    found = identity(size, turns) + 0 * turns
    if terms > 1:
        found += 2 * turns
    if terms > 2:
        power = turns @ turns
        found += 2 * power
        for _ in range(3, terms - 1):
            power = power @ turns
            found += 2 * power
        found += power @ turns
    return found


def _single(eps: float, count: int) -> float:
    """eps / √count in single precision, as PEFT has it."""
    import numpy as np

    return float(np.float32(1) / np.sqrt(np.float32(count)) * np.float32(eps))


def _size(shapes: Shapes) -> int:
    """b, of which the upper triangle has so many values."""
    return (1 + math.isqrt(1 + 8 * shapes["Q"][-1])) // 2


def _version(config: Mapping[str, Any]) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    return (int(found[1]), int(found[2])) if found else (0, 0)
