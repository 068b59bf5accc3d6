"""LoRAPrune: W'[o, j] = mask[o] (W[o, j] + s · sum over k of B[o, k] A[k, j]).

The bound is LoRA's, and that of the sum and of one product more, times the mask; u = 2^-24.
"""

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
    return {**lora.part(arrays, start, stop), "mask": arrays["mask"][:].reshape(-1)[start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    size = lora.rebuild(weight, part, numbers, exact)
    size += np.abs(exact) * 2.0**-23
    mask = part["mask"][:, None]
    exact *= mask
    size *= np.abs(mask)
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
