"""GraLoRA: a thin product for each block of the weight.

The weight is cut into N × N blocks. Block (j, n), j along out and n along in, gets

    s · B[j, n r/N : (n + 1) r/N, :]ᵀ A[n, :, j r/N : (j + 1) r/N]ᵀ        A (N, in/N, r), B (N, r, out/N)

with s = alpha / (r + h). With h above 0 the whole weight gets s · G F too, F (h, in), G (out, h). Source: arXiv
2505.20355, section 3; `forward` in peft/tuners/gralora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH, is_number, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral


class Gralora(Base):
    PEFT = {
        "GRALORA": {
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general.weight": "F",
            "gralora_B_general.weight": "G",
        }
    }
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "gralora_k": POSITIVE,
        "alpha": Field("a number", is_number, 64),
        "hybrid_r": Field("0 or more", lambda value: isinstance(value, int) and value >= 0, 0),
        "fan_in_fan_out": SWITCH,
        **neutral("gralora_dropout", "init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        rank, blocks, more = config["r"], config["gralora_k"], config.get("hybrid_r", 0)
        if lacking := needs(shapes, "A", "B", *(("F", "G") if more else ())):
            raise AdapterError(f"{where}: its {lacking} is missing, with hybrid_r={more}; save the adapter again")
        down, up = shapes["A"], shapes["B"]
        fits = len(down) == 3 == len(up) and (down[0], down[2], up[0], up[1]) == (blocks, rank, blocks, rank)
        hybrid = {role: shapes[role] for role in ("F", "G") if role in shapes}
        wanted = {"F": (more, blocks * down[1]), "G": (blocks * up[-1], more)} if more else {}
        if not fits or hybrid != wanted or rank % blocks:
            raise AdapterError(
                f"{where} and r={rank}, gralora_k={blocks}, hybrid_r={more} of the config do not go together; save the "
                "adapter again"
            )
        return {"r": rank, "blocks": blocks, "scale": config.get("alpha", 64) / (rank + more)}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["B"][2]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["B"][0] * shapes["B"][2], shapes["A"][0] * shapes["A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        blocks, rank, rows = arrays["B"].shape
        first, last, thin = start // rows, stop // rows, rank // blocks
        found = {"A": arrays["A"][:][:, :, first * thin : last * thin], "B": arrays["B"][first:last]}
        if "F" in arrays:
            found |= {"F": arrays["F"][:], "G": arrays["G"][start:stop]}
        return found

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        thin = numbers["r"] // numbers["blocks"]
        wide, rows = arrays["A"].shape[1], arrays["B"].shape[2]
        found = weight * 0
        for below in range(len(weight) // rows):
            block = start // rows + below
            for along in range(numbers["blocks"]):
                up = arrays["B"][block, along * thin : (along + 1) * thin].T
                down = arrays["A"][along, :, block * thin : (block + 1) * thin].T
                found[below * rows : (below + 1) * rows, along * wide : (along + 1) * wide] = up @ down
        if "F" in arrays:
            found += arrays["G"][start : start + len(weight)] @ arrays["F"]
        return found * numbers["scale"]
