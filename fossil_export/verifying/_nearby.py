"""Values around a weight's exact ones, which float32 may have made of them, and what an encoder may make of these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import BLOCK
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._header import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

UNIT = 2.0**-24
"""The error of one rounding to float32."""

ROUNDED = {"BF16": 2.0**-7, "F16": 2.0**-10}
"""What rounding can put between two decoded values, and what `rounds_to` may be."""


def reach_of(exact: Array, bound: Array | None) -> Array:
    """How far from the exact values those may be that were computed in float32 and rounded to it, and then some."""
    import numpy as np

    found: Array = np.abs(exact) * (4 * UNIT) + 2.0**-140
    return found if bound is None else found + 2.0 * bound


def nearby(exact: Array, reach: Array) -> Iterator[Array]:
    """Values within reach: all larger or smaller, in size or as numbers, and some of each. They are in one array."""
    import numpy as np

    found = np.empty(exact.shape, np.float32)
    for kind in ("size", "number", *range(2)):
        for direction in (1, -1):
            generator = np.random.default_rng(kind if isinstance(kind, int) else 0)
            for some in blocks(exact.shape):
                signs: Any = direction
                if kind == "size":
                    signs = np.sign(exact[some]) * np.float32(direction)
                elif isinstance(kind, int):
                    signs = (generator.integers(0, 2, exact[some].shape, np.int8) * 2 - 1) * np.float32(direction)
                np.copyto(found[some], exact[some] + signs * reach[some])
            yield found


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


class Points:
    """The exact values of some elements, and those at the ends of their reach, as the encoder sees them."""

    def __init__(self, coded: TensorInfo, elements: Array, exact: Array, reach: Array, rounds_to: str | None) -> None:
        import numpy as np

        self.fine = coded.dtype != "BF16"
        """Whether decoded values tell codes apart, of which 8 bits may be near each other."""
        values, far = exact.reshape(-1)[elements], reach.reshape(-1)[elements]
        points = [values - far, values, values + far]
        if rounds_to in ROUNDED:
            points = [one.astype(numpy_dtype(rounds_to)) for one in points]
        self._points = [one.astype(np.float64) for one in points]
        self._more = np.abs(self._points[1]) * (8 * UNIT + ROUNDED.get(coded.dtype, 0.0))

    def nearest(self, values: Array, given: list[Array]) -> Array:
        """Where a point is no further from the value than from all of those that are given for it."""
        import numpy as np

        found = np.zeros(len(values), bool)
        for point in self._points:
            best = np.minimum.reduce([np.abs(one - point) for one in given])
            found |= np.abs(values - point) <= best + self._more
        return found


def outside(name: str, found: Array, low: Array, high: Array) -> str | None:
    """What is wrong with a parameter that is not among, or between, those of the nearby values."""

    own, least, most = (one.reshape(-1) for one in (wide(found), low, high))
    inside = (own >= least) & (own <= most)
    if inside.all():
        return None
    return f"has {int((~inside).sum())} other values in {name}, the first at [{int((~inside).argmax())}]"


def is_text(info: TensorInfo, stored: Array) -> bool:
    """Whether a stored tensor is JSON."""
    return info.dtype == "U8" and _json(stored) is not None


def wide(parameter: Array) -> Array:
    """As numbers that any of its dtypes holds."""
    import numpy as np

    found: Array = parameter.astype(np.float64)
    return found


def says(found: Array, nearby: list[Array]) -> bool:
    """Whether a text says nothing else, and numbers between theirs."""
    own, others = _json(found), [_json(one) for one in nearby]
    return own is not None and all(_between(own, others, key) for key in own)


def _json(array: Array) -> dict[str, Any] | None:
    try:
        found = json.loads(array.tobytes())
    except (ValueError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None


def _between(found: dict[str, Any], nearby: list[dict[str, Any] | None], key: str) -> bool:
    values = [one.get(key) for one in nearby if one is not None]
    if isinstance(found[key], float) and all(isinstance(one, float) for one in values):
        floats: list[float] = values  # type: ignore[assignment]
        own: float = found[key]
        return min(floats) <= own <= max(floats)
    return bool(found[key] in values)
