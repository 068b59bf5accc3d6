"""A weight that is quantized the other way round than it is stored: transformers' Conv1D.

It is stored as (in, out), and quantized as (out, in): `Bnb4bitQuantize` in transformers/integrations/bitsandbytes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._trained_on import QUANTIZERS, TrainedOn

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Turned:
    """A float tensor (in, out) of which training saw the transpose quantized.

    All of it is read for any of its rows: such models are old and small.
    """

    weight: TensorInfo
    seen: TrainedOn

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.weight,)

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        inputs, outputs = self.weight.shape
        flat = rows_of(self.weight, 0, inputs)[:].T.reshape(-1)

        def turned(info: TensorInfo, first: int, last: int) -> Array:
            row = element_count(info.shape[1:])
            found: Array = flat[info.first + first * row : info.first + last * row]
            return found.reshape(last - first, *info.shape[1:])

        # Without an offset, parts of it are told by their first element.
        own = replace(self.weight, shape=(outputs, inputs), offset=None)
        whole = QUANTIZERS[self.seen.kind](own, self.seen).open(turned, 0, outputs)(0, outputs).T

        def decode(first: int, last: int) -> Array:
            rows: Array = whole[start + first : start + last]
            return rows

        return decode
