"""Mini: W'[o, j] = W[o, j] + D[j mod r, o mod m]; tile, with a column of D for each row o of W."""

from __future__ import annotations

from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._tile import COMPILED, across, columns, down, rebuild, unit, up

__all__ = ["COMPILED", "across", "columns", "down", "part", "rebuild", "unit", "up"]


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    import numpy as np

    shard = arrays["D"]
    return {"D": shard[:, np.arange(start, stop) % shard.shape[1]]}
