"""BOFT: the inputs turned by a product of sparse orthogonal matrices, and the outputs scaled.

    W'[o] = s[o] · (W (M_N … M₂ M₁)ᵀ)[o]        M_i = P_i diag(R₁, …, R_D) P_iᵀ, the bias stays

R (b, b) is Cayley's transform (I - S)(I + S)⁻¹ of S = (X - Xᵀ) / 2, X as it is stored. P_i is the permutation of a
butterfly; there is none with N = 1, the only one that PEFT trains without its CUDA extension. Convolutions are refused:
PEFT's own forward pass takes one stride, padding and size of the kernel for both axes, and the weight does not tell
whether they are equal. Source: arXiv 2311.06243; peft/tuners/boft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import POSITIVE, Arrays, Combination, Field, Numbers, Shapes
from fossil_export.methods._rotation import by_blocks, cayley, like, wide

_COUNT = Field("an integer that is not negative", lambda value: type(value) is int and value >= 0, 0)


class Boft(Base):
    PEFT = {"BOFT": {"boft_R": "X", "boft_s": "s"}}
    COMBINES: Combination = "order"
    FIELDS = {
        "boft_block_size": Field(_COUNT.expected, _COUNT.holds, 4),
        "boft_block_num": _COUNT,
        "boft_n_butterfly_factor": Field(POSITIVE.expected, POSITIVE.holds, 1),
        "fan_in_fan_out": SWITCH,
        "boft_dropout": Field(),
        "init_weights": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "X", "s"):
            raise AdapterError(f"{where}: its {lacking} is missing; save the adapter again")
        blocks, scales = shapes["X"], shapes["s"]
        if len(blocks) != 4 or blocks[2] != blocks[3] or len(scales) != 2 or 1 not in scales:
            raise AdapterError(f"{where}: they do not go together; save the adapter again")
        if scales[1] != 1:
            raise AdapterError(f"{where}: is of a convolution, which cannot be merged here; use PEFT's merge")
        said = config.get("boft_n_butterfly_factor", 1)
        if blocks[0] > 1 and (blocks[0] != said or blocks[1] % 2 ** (said - 1) or blocks[2] % 2):
            raise AdapterError(
                f"{where} has {blocks[0]} factors, but the config says boft_n_butterfly_factor={said}; mend the config"
            )
        # Rotations are made anew for each lot of rows: fewer would take longer than the product.
        return {"r": blocks[2], "factors": blocks[0], "block_rows": blocks[2]}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = shapes["s"][0], shapes["X"][1] * shapes["X"][2]
        if found[0] != weight[0]:
            return f"it is made for {found[0]} outputs, the weight has {weight[0]}"
        return f"it is made for {found[1]} inputs, the weight has {weight[1]}" if found[1] != weight[1] else None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"X": arrays["X"][:], "s": arrays["s"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return self._turned(weight, arrays, start) - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight[:] = self._turned(weight, arrays, start)

    def _turned(self, weight: Any, arrays: Arrays, start: int) -> Any:
        stored = wide(arrays["X"])
        found, factors, (count, size) = weight, len(stored), stored.shape[1:3]
        for number in range(factors):
            blocks = like(cayley((stored[number] - stored[number].swapaxes(1, 2)) / 2).swapaxes(1, 2), weight)
            if factors == 1:
                found = by_blocks(found, blocks)
                continue
            order = butterfly(count * size, count >> number, size // 2)
            back = sorted(range(len(order)), key=order.__getitem__)
            found = by_blocks(found[:, back], blocks)[:, order]
        return found * arrays["s"][start : start + len(weight)]


def butterfly(inputs: int, blocks: int, half: int) -> list[int]:
    """P_i by rows: row k of P x is x[order[k]]. Within each of the `blocks`, runs of `half` columns are reordered, the
    even ones first (`block_butterfly_perm`)."""
    width = inputs // blocks
    runs = range(width // half)
    order = [run * half + at for run in (*runs[::2], *runs[1::2]) for at in range(half)]
    return [first + at for first in range(0, inputs, width) for at in order]
