"""BD-LoRA: LoRA with a block-diagonal A or B, zero at [o, k] unless both are in the same of n blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["down", "part", "rebuild", "unit", "up"]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    import numpy as np

    rows, rank = arrays["B"], arrays["A"].shape[0]
    if rows.shape[1] == rank:
        return lora.part(arrays, start, stop)
    size = rows.shape[0] // (rank // rows.shape[1])
    own = np.arange(start, stop)[:, None] // size == np.arange(rank) // rows.shape[1]
    wide = np.asarray(rows[start:stop])[:, np.arange(rank) % rows.shape[1]]
    return {"A": arrays["A"][:], "B": np.where(own, wide, wide.dtype.type(0))}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    return lora.rebuild(weight, {"A": down(part, numbers, weight.shape[1]), "B": part["B"]}, numbers, exact)


def up(part: Arrays, numbers: Mapping[str, Any]) -> Array | None:
    return lora.up(part, numbers)


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array:
    import numpy as np

    stored = np.asarray(arrays["A"][:])
    (rank, width), ranks = stored.shape, np.arange(len(stored))
    columns = np.arange(inputs)
    own = ranks[:, None] // (rank * width // inputs) == columns // width
    found: Array = np.where(own, stored[:, columns % width], stored.dtype.type(0))
    return found
