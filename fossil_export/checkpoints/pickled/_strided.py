"""A tensor that does not lie in its file in its own order: transposed, stepped or repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Strided:
    """A tensor of `shape` whose element [i, j, …] is number i · strides[0] + j · strides[1] + … of the elements
    `stored` (n,), from its first to its last."""

    elements: TensorInfo
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.elements,)

    @property
    def width(self) -> int:
        return self.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        from fossil_export.checkpoints._header import slice_of

        if self._is_transposed:
            turned = slice_of(self.elements, 0, element_count(self.shape), self.shape[::-1])
            columns = rows_of(turned, 0, self.shape[1])[:, start:stop]

            def decode(first: int, last: int) -> Array:
                found: Array = columns.T[first:last]
                return found.copy()

            return decode
        # Rows of a matrix are entries of the tensor's first axes; what lies between these entries is read.
        each = element_count(self.shape[1:-1])
        begin, end = start // each, -(-stop // each)
        rows = self._read(rows_of, begin, end).reshape(-1, self.width)[start - begin * each : stop - begin * each]
        return lambda first, last: rows[first:last]

    @property
    def _is_transposed(self) -> bool:
        return len(self.shape) == 2 and self.strides == (1, self.shape[0])

    def _read(self, rows_of: ReadRows, begin: int, end: int) -> Array:
        from numpy.lib.stride_tricks import as_strided

        shape = (end - begin, *self.shape[1:])
        origin = begin * self.strides[0]
        last = sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        raw = rows_of(self.elements, origin, origin + last + 1)[:]
        steps = [stride * raw.dtype.itemsize for stride in self.strides]
        found: Array = as_strided(raw, shape, steps, writeable=False).copy()
        return found
