"""LoKr: a Kronecker product.

    W'[i·b + p, j·d + q] = W[…] + s · W₁[i, j] · W₂[p, q]        W₁ (a, c), W₂ (b, d), W (a·b, c·d), s = alpha / r

Either may be a product of two thin matrices: W₁ = A₁ B₁, W₂ = A₂ B₂. Of a convolution W₂ is (b, d, *kernel), and with
`use_effective_conv2d` W₂[p, q, k] = sum over i, j of T[i, j, k] A[i, p] B[j, q]. Of a convolution in one dimension
whose W₂ (b, d, k) is stored whole, PEFT takes the product with W₁ in W₂'s last two dimensions, and then reshapes: that
is what was trained, so that is what is merged. Source: arXiv 2309.14859, section 3.2; `get_delta_weight` in
peft/tuners/lokr/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._loha import LYCORIS, rank_and_scale, with_core
from fossil_export.methods._lora import SWITCH, unlike
from fossil_export.methods._method import Arrays, Field, Numbers, Shapes

_FORMS = ({"W1"}, {"A1", "B1"}), ({"W2"}, {"A2", "B2"}, {"A2", "B2", "T2"})


class Lokr(Base):
    PEFT = {
        "LOKR": {
            "lokr_w1": "W1",
            "lokr_w1_a": "A1",
            "lokr_w1_b": "B1",
            "lokr_w2": "W2",
            "lokr_w2_a": "A2",
            "lokr_w2_b": "B2",
            "lokr_t2": "T2",
        }
    }
    FIELDS = {
        **LYCORIS,
        # What is decomposed and how, the tensors tell.
        "decompose_both": SWITCH,
        "decompose_factor": Field("an integer", lambda value: isinstance(value, int), -1),
        "rank_dropout_scale": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        for number, forms in zip("12", _FORMS, strict=True):
            if {role for role in shapes if role.endswith(number)} not in forms:
                raise AdapterError(f"{where}: these are not all of its W{number}; save the adapter again")
        sizes = {role: len(shape) for role, shape in shapes.items() if role not in ("W2", "T2")}
        ranks: set[int] = set()
        fits = set(sizes.values()) <= {2} and len(shapes.get("W2", (0, 0))) in (2, 3, 4)
        fits = fits and len(shapes.get("T2", (0, 0, 0, 0))) == 4
        if fits and "A1" in shapes:
            ranks |= {shapes["A1"][1], shapes["B1"][0]}
        if fits and "A2" in shapes:
            ranks |= {shapes["A2"][0 if "T2" in shapes else 1], shapes["B2"][0], *shapes.get("T2", ())[:2]}
        if not fits or len(ranks) > 1:
            raise AdapterError(f"{where}: they do not go together; save the adapter again")
        rank, scale = rank_and_scale(config, module, where, next(iter(ranks), None))
        return {"r": rank, "scale": scale}

    def dimensions(self, shapes: Shapes) -> int | None:
        return len(shapes["W2"]) if "W2" in shapes else None

    def block_rows(self, shapes: Shapes) -> int:
        rows = _rows(shapes)
        return rows[0] * rows[1] if _is_odd(shapes) else rows[1]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        first, second = _rows(shapes)
        left = (shapes["W1"] if "W1" in shapes else shapes["B1"])[1]
        right = math.prod(shapes["W2"][1:]) if "W2" in shapes else shapes["B2"][1] * math.prod(shapes.get("T2", ())[2:])
        return unlike((first * second, left * right), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        shapes = {role: tuple(array.shape) for role, array in arrays.items()}
        size = _rows(shapes)[1]
        rows = slice(None) if _is_odd(shapes) else slice(start // size, -(-stop // size))
        return {role: array[rows] if role in ("W1", "A1") else array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        left = arrays["W1"] if "W1" in arrays else arrays["A1"] @ arrays["B1"]
        if "W2" in arrays:
            right = arrays["W2"]
        elif "T2" in arrays:
            right = arrays["A2"].T @ with_core(arrays["T2"], arrays["B2"])
        else:
            right = arrays["A2"] @ arrays["B2"]
        if len(right.shape) == 3:
            found = right[:, None, :, None, :] * left[None, :, None, :, None]
            found = found.reshape(len(left) * len(right), -1)[start : start + len(weight)]
        else:
            right = right.reshape(len(right), -1)
            rows = [divmod(row, len(right)) for row in range(start, start + len(weight))]
            first, second = left[[i for i, _ in rows]], right[[p for _, p in rows]]
            found = (first[:, :, None] * second[:, None]).reshape(len(weight), -1)
        found *= numbers["scale"]
        return found


def _rows(shapes: Shapes) -> tuple[int, int]:
    """a and b."""
    second = shapes["W2"][0] if "W2" in shapes else shapes["A2"][1 if "T2" in shapes else 0]
    return (shapes["W1"] if "W1" in shapes else shapes["A1"])[0], second


def _is_odd(shapes: Shapes) -> bool:
    """Whether it is the case of one dimension, whose rows are all mixed."""
    return len(shapes.get("W2", ())) == 3
