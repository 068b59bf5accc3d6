"""BEFT: b'[o] = b[o] + c[0, o], a single sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["down", "part", "rebuild", "unit", "up"]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"c": arrays["c"][:, start:stop]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> None:
    exact[:, 0] = weight[:, 0] + part["c"][0]


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
