"""SBoRA: s · B[o, k] is added to W[o, c[k]] for each k, or s · A[k, j] to W[d[k], j].

The bound is that of a product by s and a sum, (n + 1) u times what is added, for places that are named n times;
u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return 1


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    if "B" in arrays:
        return {"columns": arrays["columns"][:], "B": arrays["B"][start:stop]}
    rows = arrays["rows"][:]
    inside = (rows >= start) & (rows < stop)
    return {"rows": rows[inside] - start, "A": arrays["A"][:][inside]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np

    exact[:] = weight
    size = np.zeros_like(exact)
    scale = numbers["scale"]
    for k, place in enumerate(part["columns" if "B" in part else "rows"].astype(int)):
        at: Any = np.s_[:, place] if "B" in part else place
        added = scale * (part["B"][:, k] if "B" in part else part["A"][k])
        exact[at] += added
        size[at] += np.abs(added) * (len(part["columns" if "B" in part else "rows"]) + 1) * 2.0**-24
    return size


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
