"""What an independent check of a method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._header import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Arrays = Mapping[str, Any]
"""A module's trained tensors by role; a module of this kind or an object will do for `Exact`."""


class Exact(Protocol):
    """One method in float64, by index, from its paper: nothing is shared with `methods/`."""

    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Rows of the weight that are rebuilt together."""

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """What rows [start, stop) need of the tensors."""

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array | None:
        """Write the exact W' for rows of W (n, in) and their part of the tensors into `exact` (n, in).

        Returns a bound (n, in) on float32's error in it, None where the float32 sum has a single rounding.
        """

    # Only of a method whose columns can be rebuilt a few at a time:
    #
    # def across(self, tensors) -> tuple[int, int]
    #     Columns of the weight that are rebuilt together, and the trained elements that each of them takes.
    # def columns(self, arrays, first, last) -> Arrays
    #     What columns [first, last) need of the tensors, before `part`.
    # COMPILED: "tiled" (W + D[j mod r, o], from `part`) or "product" (`factors` gives left, right and scale), which
    #     compare.c has loops for.

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> Array | None:
        """Rows (n, r) of B, if the update is B A whatever the weight is; None if it depends on the weight."""

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> Array | None:
        """That A (r, in)."""
