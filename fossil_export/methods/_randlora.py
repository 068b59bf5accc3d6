"""RandLoRA: random bases that all modules share, weighed by two trained matrices of each.

    X (m, n r) = B[: m, : n] as one matrix,  Y (r n, l): row (k, b) is λ[k, b] γ[b] ⊙ A[k, 0, : l]
    W' = W + s · X Y, or s · (X Y)ᵀ for a weight with fewer outputs than inputs

    A (r, 1, ·), B (·, ·, r), λ (r, n), γ (n, l), s = alpha / r; l is the smaller of out and in, m the larger

PEFT saves A and B once for all and once more in each module; the copies must be equal. Columns of X are counted by
(b, k) and rows of Y by (k, b), as PEFT has it. Source: arXiv 2502.00987, section 4;
`get_scaled_bases` and `forward` in peft/tuners/randlora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import WHOLE, Base, needs
from fossil_export.methods._lora import SWITCH, is_number
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral
from fossil_export.methods._vera import drawn


class Randlora(Base):
    PEFT = {
        "RANDLORA": {
            "randlora_lambda": "l",
            "randlora_gamma": "g",
            "randlora_A": "copy of A",
            "randlora_B": "copy of B",
        }
    }
    SHARED = {"RANDLORA": {"base_model.randlora_A": "A", "base_model.randlora_B": "B"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "randlora_alpha": Field("a number", is_number, 640),
        "save_projection": drawn("randlora"),
        "fan_in_fan_out": SWITCH,
        **neutral("projection_prng_key", "randlora_dropout", "init_weights", "sparse", "very_sparse"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "l", "g"):
            names = {"l": "lambda", "g": "gamma"}
            raise AdapterError(
                f"{where}: its randlora_{names.get(lacking, lacking)} is missing; save the adapter again"
            )
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: the file lacks base_model.randlora_{lacking}; save it with its projection")
        for role in "AB":
            if shapes.get(f"copy of {role}", shapes[role]) != shapes[role]:
                raise AdapterError(f"{where}: its randlora_{role} is no copy of the shared one; save the adapter again")
        rank = config["r"]
        down, up, outer, inner = (shapes[role] for role in ("A", "B", "l", "g"))
        if (len(down), len(up), len(outer), len(inner)) != (3, 3, 2, 2) or down[1] != 1:
            raise AdapterError(f"{where}: these do not go together; save the adapter again")
        if not rank == down[0] == up[2] == outer[0] or outer[1] != inner[0] or up[1] < inner[0]:
            raise AdapterError(f"{where}, the shared bases and r={rank} of the config do not go together")
        return {"r": rank, "scale": config.get("randlora_alpha", 640) / rank}

    def block_rows(self, shapes: Shapes) -> int:
        return WHOLE

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        small, large = min(weight), max(weight)
        if shapes["g"][1] != small:
            return f"it is made for a smaller side of {shapes['g'][1]}, the weight has {small}"
        if shapes["A"][2] < small or shapes["B"][0] < large:
            return f"the shared bases are too small for {list(weight)}"
        return None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {role: array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        for role in "AB":
            if f"copy of {role}" in arrays and (arrays[f"copy of {role}"] != arrays[role]).any():
                raise AdapterError(f"a module's randlora_{role} is no copy of the shared one; save the adapter again")
        count, small = arrays["g"].shape
        left = arrays["B"][: max(weight.shape), :count].reshape(max(weight.shape), -1)
        right = arrays["l"][:, :, None] * arrays["A"][:, :, :small] * arrays["g"]
        found = left @ right.reshape(-1, small)
        return (found if weight.shape[1] == small else found.T) * numbers["scale"]
