"""LoHa: a product, value by value, of two products of thin matrices.

    W' = W + s · (A₁ B₁) ∘ (A₂ B₂)        A (out, r), B (r, in), s = alpha / r

Of a convolution with `use_effective_conv2d` each of the two has a core T (r, r, *kernel) between its matrices:

    (A, B, T)[o, i, k] = sum over p, q of T[p, q, k] A[p, o] B[q, i]        A (r, out), B (r, in)

Without it B is (r, in · kernel). PEFT holds s in single precision, whatever the weights have. Source: arXiv 2108.06098,
section 2; `HadaWeight` and `HadaWeightCP` in peft/tuners/loha/layer.py, whose order of operations this is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import FIELDS, PATTERN, SWITCH, alpha_of, matching, of_pattern, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes

LYCORIS: Mapping[str, Field] = {
    "r": Field(POSITIVE.expected, POSITIVE.holds, 8),
    "alpha": FIELDS["lora_alpha"],
    "rank_pattern": PATTERN,
    "alpha_pattern": PATTERN,
    "use_effective_conv2d": SWITCH,
    # What only says how training began or ran.
    "rank_dropout": Field(),
    "module_dropout": Field(),
    "init_weights": Field(),
}
"""The fields that LoHa and LoKr share; whether a convolution is decomposed further, its tensors tell."""

_PLAIN = ("A1", "B1", "A2", "B2")


class Loha(Base):
    PEFT = {
        "LOHA": {
            "hada_w1_a": "A1",
            "hada_w1_b": "B1",
            "hada_w2_a": "A2",
            "hada_w2_b": "B2",
            "hada_t1": "T1",
            "hada_t2": "T2",
        }
    }
    FIELDS = LYCORIS

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        cored = "T1" in shapes or "T2" in shapes
        lacking = [role for role in (*_PLAIN, *(("T1", "T2") if cored else ())) if role not in shapes]
        if lacking:
            raise AdapterError(f"{where}: its {' and '.join(lacking)} is missing; save the adapter again")
        flat = all(len(shape) == (4 if role[0] == "T" else 2) for role, shape in shapes.items())
        rank = shapes["B1"][0] if flat else 0
        for half in "12" if flat else "":
            core = shapes.get(f"T{half}", (rank, rank))[:2]
            flat = flat and {shapes[f"A{half}"][0 if cored else 1], shapes[f"B{half}"][0], *core} == {rank}
        if not flat:
            raise AdapterError(f"{where}: they do not go together; save the adapter again")
        if _sizes({role.replace("1", "2"): size for role, size in shapes.items() if "1" in role}) != _sizes(shapes):
            raise AdapterError(f"{where}: its two products differ in shape; save the adapter again")
        rank, scale = rank_and_scale(config, module, where, rank)
        try:
            scale = struct.unpack("<f", struct.pack("<f", scale))[0]
        except OverflowError as problem:
            raise AdapterError(f"{where}: its alpha overflows float32; mend the config") from problem
        return {"r": rank, "scale": scale}

    def dimensions(self, shapes: Shapes) -> int | None:
        return None

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike(_sizes(shapes), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        def rows(up: Any) -> Any:
            return up[:, start:stop] if "T1" in arrays else up[start:stop]

        return {role: rows(array) if role in ("A1", "A2") else array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        found = _product(arrays, "1", start, len(weight))
        found *= _product(arrays, "2", start, len(weight))
        found *= numbers["scale"]
        return found


def _sizes(shapes: Shapes) -> tuple[int, int]:
    """(out, in · kernel) of what the second product makes."""
    up, down = shapes["A2"], shapes["B2"]
    if "T2" not in shapes:
        return up[0], down[1]
    return up[1], down[1] * math.prod(shapes["T2"][2:])


def _product(arrays: Arrays, half: str, start: int, count: int) -> Any:
    """Rows of one of the two products (n, in · kernel)."""
    up, down, core = arrays[f"A{half}"], arrays[f"B{half}"], arrays.get(f"T{half}")
    if core is None:
        return up[start : start + count] @ down
    return up[:, start : start + count].T @ with_core(core, down)


def with_core(core: Any, down: Any) -> Any:
    """Sum over q of T[p, q, k] B[q, i], as a matrix (r, in · kernel)."""
    rank = len(core)
    return (core.reshape(rank, rank, -1).swapaxes(1, 2) @ down).swapaxes(1, 2).reshape(rank, -1)


def rank_and_scale(config: Mapping[str, Any], module: str, where: str, rank: int | None) -> tuple[int, float]:
    """r and alpha / r of a module; raises AdapterError if its tensors have another rank than the config says.

    Source: `_create_and_replace` in peft/tuners/{loha,lokr}/model.py.
    """
    said = of_pattern(config, "rank_pattern", module, config.get("r", LYCORIS["r"].default), where, rank)
    if rank is None and len(set(matching(config, "rank_pattern", module, where).values())) > 1:
        raise AdapterError(
            f"{where}: rank_pattern has several values for it, and its tensors do not tell which; training took the "
            "first, but PEFT sorts them when it saves; keep the one it was trained with"
        )
    if not POSITIVE.holds(said) or rank not in (None, said):
        raise AdapterError(f"{where} has rank {rank}, but the config says r={said}; mend the config")
    alpha = alpha_of(config, module, config.get("alpha", LYCORIS["alpha"].default), where)
    return said, alpha / said
