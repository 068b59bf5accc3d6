"""BD-LoRA: LoRA of which one factor is block-diagonal, and only its blocks are stored.

    W' = W + s · B A        A = diag(A[1], …, A[n]), A[b] (r/n, in/n), stored as (r, in/n); or B so, as (out, r/n)

Which factor it is the config says by parts of the modules' names. Source: arXiv 2510.23346; `BlockDiagonalLinear` and
`BdLoraLinearVariant` in peft/tuners/lora/variants.py. PEFT's own merge rounds the update to the base's dtype first; the
live model does not, and neither does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import Arrays, Numbers, Shapes


class BdLora(Base):
    PEFT = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B"}}
    FIELDS = lora.FIELDS

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        said = config.get("use_bdlora")
        if not said:
            return None
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
        down, up = shapes["A"], shapes["B"]
        blocks = said.get("nblocks", 1)
        first, second = (
            any(part in module for part in said.get(f"target_modules_bd_{side}") or []) for side in ("a", "b")
        )
        whole = blocks if second and not first else 1
        if len(down) != 2 or len(up) != 2 or up[1] * whole != down[0] or (first and second) or down[0] % blocks:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        if up[0] % whole:
            raise AdapterError(f"{where}: {up[0]} outputs are not {whole} blocks; save the adapter again")
        numbers = lora.scaled(config, module, down[0], where)
        return {**numbers, "blocks_of_A": blocks if first else 1, "blocks_of_B": whole}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return lora.unlike((shapes["B"][0], shapes["A"][1] * numbers["blocks_of_A"]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        down = arrays["A"][:]
        return {"A": down, "B": _spread(arrays["B"][:], down.shape[0])[start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        up, down = _factors(arrays, numbers)
        return lora.product(up[start : start + len(weight)], down, numbers["scale"])

    def form_rank(self, shapes: Shapes) -> int | None:
        return shapes["A"][0]

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        up, down = _factors(arrays, numbers)
        return LowRank(up * numbers["scale"], down)


def _factors(arrays: Arrays, numbers: Numbers) -> tuple[Any, Any]:
    """B (n, r), of all rows or of those at hand, and A (r, in), with zeros beside the blocks."""
    down = arrays["A"]
    return _spread(arrays["B"], down.shape[0]), _spread(down, down.shape[1] * numbers["blocks_of_A"])


def _spread(blocks: Any, width: int) -> Any:
    """The matrix of this width whose diagonal has these blocks, of which as many are stored as fit into it."""
    rows, own = blocks.shape
    count = width // own
    if count == 1:
        return blocks
    shape, size = (rows, width), rows // count
    if hasattr(blocks, "requires_grad"):
        found = blocks.new_zeros(shape)
    else:
        import numpy as np

        found = np.zeros(shape, blocks.dtype)
    for block in range(count):
        at = slice(block * size, (block + 1) * size)
        found[at, block * own : (block + 1) * own] = blocks[at]
    return found
