"""Supertuning: W'[o, j] = W[o, j] + sum of the v[k] with i[k] = o · in + j, + s · sum over k of B[o, k] A[k, j].

float32's error is at most (r + 3) u (s |B||A| + |v|), and nothing without the products if no place is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference import _shira as shira
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["down", "part", "rebuild", "unit", "up"]

unit, part, up, down = shira.unit, shira.part, shira.up, shira.down


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    rows, columns = np.divmod(part["#i"].astype(np.int64), weight.shape[1])
    bound = shira.sparse(weight, rows, columns, part["v"], exact)
    if "A" not in part:
        return bound
    share = numbers["share"]
    exact += share * (part["B"] @ part["A"])
    size = abs(share) * (np.abs(part["B"]) @ np.abs(part["A"]))
    np.add.at(size, (rows, columns), np.abs(part["v"]))
    bound += (len(part["A"]) + 3) * 2.0**-24 * size
    return bound
