"""RoAd: outputs k and k + h of each group of 2h are turned: c y[k] - d y[k + h], and c y[k + h] + d y[k].

c = α cos θ and d = α sin θ are those of the output that is made; which α and θ that are, the variant says (arXiv
2409.00119, table 1). Two products, their sum and factors rounded once: 3 u of each product, u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.reference._exact import Arrays
from fossil_export.verifying.reference._lora import unit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class _Road:
    def __init__(self, values: int) -> None:
        self._values = values  # of each pair of outputs

    def unit(self, tensors: Mapping[str, Any]) -> int:
        return unit(tensors)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        rows = slice(start * self._values // 2, stop * self._values // 2)
        return {role: array[rows] for role, array in arrays.items()}

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        import numpy as np

        group = numbers["group"]
        half = group // 2
        at = np.arange(len(weight))
        first, within = at - at % group, at % group
        if self._values == 1:
            mine = other = first // 2 + within % half
        elif self._values == 2:
            mine = other = at
        else:
            mine, other = 2 * first + within, 2 * first + group + within
        own = (part["alpha"][mine] * np.cos(part["theta"][mine]))[:, None]
        cross = (part["alpha"][other] * np.sin(part["theta"][other]))[:, None]
        partner = weight[first + (within + half) % group]
        exact[:] = own * weight + np.where(within < half, -1.0, 1.0)[:, None] * cross * partner
        bound: Array = (np.abs(own * weight) + np.abs(cross * partner)) * 3 * 2.0**-24
        return bound

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> None:
        return None

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
        return None


road_1, road_2, road_4 = _Road(1), _Road(2), _Road(4)
