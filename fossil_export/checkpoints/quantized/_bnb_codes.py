"""Weights that bitsandbytes stored in 4 or 8 bits, read and written.

    4 bits: W[k] = level(code[k]) · absmax[k // block]         k: the element's number in the weight's own order
    8 bits: W[o, i] = code[o, i] · SCB[o] · (1 / 127)

in float32, rounded once. Two codes are in a byte, the first in its upper half. With double quantization absmax is
table[code'[b]] · nested_absmax[b // nested block] + offset. Source: `kDequantizeBlockwise` in bitsandbytes'
csrc/kernels.cu, `dequantizeBlockwise4bitCpu` in its csrc/cpu_ops.cpp (which takes wrong scales on AVX-512 if blocks do
not divide rows, as that on CUDA does not), and `int8_vectorwise_dequant` in bitsandbytes/_ops.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import BLOCK, Coding, Decode
from fossil_export.checkpoints._dtypes import BITS, element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints._rounding import rounded
from fossil_export.checkpoints.quantized._blocks import NESTED, PIECE, Nested, magnitudes, nested, pieces, scale
from fossil_export.checkpoints.quantized._bnb_state import QuantState, with_offset
from fossil_export.checkpoints.quantized._levels import BY_CODE, INVERSE_127, codes_of, dynamic_map, numbers, taken
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

LEAST = 1e-38
"""What it takes for the scale of a block of zeros, to divide by."""


@dataclass(frozen=True)
class NestedScales:
    """The scales of scales, and what the codes of these stand for."""

    outer: TensorInfo
    table: TensorInfo


@dataclass(frozen=True)
class FourBitCodes:
    """Codes of nf4 or fp4, two in a byte, and the scale of each block of them."""

    codes: TensorInfo
    scales: TensorInfo
    levels: TensorInfo
    text: TensorInfo
    state: QuantState
    nested: NestedScales | None = None

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        own = (self.codes, self.scales, self.levels, self.text)
        return own if self.nested is None else (*own, self.nested.outer, self.nested.table)

    @property
    def width(self) -> int:
        return self.state.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        block, width = self.state.block, self.width
        levels = self._levels(rows_of)
        both = np.arange(256)
        pairs = np.stack([levels[both >> 4], levels[both & 15]], 1).view(np.uint64).reshape(-1)
        first = start * width // block * block
        last = min(-(-stop * width // block) * block, element_count(self.state.shape))
        size = BITS[self.codes.dtype] // 8
        codes = _part(self.codes, rows_of, first // 2 // size, -(-last // (2 * size))).view(np.uint8)
        scales = self._scales(rows_of, first // block, -(-last // block))
        ahead = start * width - first

        def decode(begin: int, end: int) -> Array:
            low, high = ahead + begin * width, ahead + end * width
            result = np.empty(high - low, numpy_dtype(self.state.dtype))
            for origin, limit in pieces(low, high, block):
                own = codes[origin // 2 : -(-limit // 2)]
                start, stop = max(origin, low), min(limit, high)
                found = taken(pairs, own, "pairs").view(np.float32)[: stop - origin]
                scale(found, scales[origin // block : -(-stop // block)], block)
                result[start - low : stop - low] = rounded(found[start - origin :], self.state.dtype)
            return result.reshape(-1, width)

        return decode

    def _levels(self, rows_of: ReadRows) -> Array:
        """By code, as the library has them: it does not look at those that are stored."""
        import numpy as np

        found = np.array(BY_CODE[self.state.kind], np.float32)
        if not np.allclose(_part(self.levels, rows_of, 0, 16), found, rtol=0, atol=1e-6):
            raise _wrong(self.levels, f"holds other levels than those of {self.state.kind}")
        return found

    def _scales(self, rows_of: ReadRows, start: int, stop: int) -> Array:
        """Of blocks [start, stop), in float32."""
        import numpy as np

        if self.nested is None or self.state.nested is None:
            return _finite(self.scales, _part(self.scales, rows_of, start, stop))
        block = self.state.nested.block
        first = start // block
        codes = _part(self.scales, rows_of, first * block, stop)
        outer = _finite(self.nested.outer, _part(self.nested.outer, rows_of, first, -(-stop // block)))
        table = _finite(self.nested.table, _part(self.nested.table, rows_of, 0, 256))
        found = Nested(codes, outer).scales(table, block, np.float32(self.state.nested.offset))
        return found[start - first * block :]

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        """As `quantize_4bit` of bitsandbytes does with float32 on a CPU, with statistics of its own."""
        import numpy as np

        values, block, kind = matrix.reshape(-1), self.state.block, self.state.kind
        scales = np.empty(-(-len(values) // block), np.float32)
        codes = np.empty(len(values) + len(values) % 2, np.uint8)
        names = codes_of(kind)
        codes[len(values) :] = names[numbers(kind, np.zeros(1, np.float32))]
        step = PIECE // block * block
        for first in range(0, len(values), step):
            part = values[first : first + step].astype(np.float32)
            own = magnitudes(part, block)
            if cut := len(part) % block:  # which is divided, and has no scale of zero
                own[-1] = max(own[-1], np.float32(LEAST))
                part[-cut:] /= own[-1]
            whole = len(part) // block
            scale(part[: whole * block], np.float32(1) / np.maximum(own[:whole], np.float32(LEAST)), block)
            scales[first // block : first // block + len(own)] = own
            codes[first : first + len(part)] = taken(names, numbers(kind, part), "values8")
        if not np.isfinite(scales).all():
            raise _wrong(self.codes, "becomes infinite or NaN")
        packed = codes[::2] << 4 | codes[1::2]
        levels = np.array(BY_CODE[kind], np.float32)
        found = {
            self.codes.name: packed.view(stored_dtype(self.codes.dtype)).reshape(self.codes.shape),
            self.levels.name: levels,
        }
        return found | (self._plain_scales(scales) if self.nested is None else self._nested_scales(scales, self.nested))

    def written(self, tensors: Mapping[str, Array]) -> FourBitCodes:
        """The coding of what `encode` gave: it has an offset of its own."""
        if self.state.nested is None:
            return self
        text = tensors[self.text.name].tobytes().decode()
        offset = float(json.loads(text)["nested_offset"])
        state = replace(self.state, text=text, nested=replace(self.state.nested, offset=offset))
        return replace(self, state=state)

    def _plain_scales(self, scales: Array) -> dict[str, Array]:
        import numpy as np

        return {self.scales.name: scales, self.text.name: np.frombuffer(self.state.text.encode(), np.uint8)}

    def _nested_scales(self, scales: Array, own: NestedScales) -> dict[str, Array]:
        import numpy as np

        assert self.state.nested is not None
        if self.state.nested.block != NESTED:
            raise _wrong(self.text, f"has a nested_blocksize that bitsandbytes does not write (it writes {NESTED})")
        offset = np.float32(scales.sum(dtype=np.float64) / len(scales))
        found = nested(scales, offset)
        text = with_offset(self.state, float(offset), self.text.nbytes)
        if text is None:
            raise _wrong(self.text, f"has no room for nested_offset {offset}")
        return {
            self.scales.name: found.codes,
            self.text.name: np.frombuffer(text, np.uint8),
            own.outer.name: found.outer,
            own.table.name: dynamic_map(),
        }


@dataclass(frozen=True)
class RowsOfInt8:
    """Whole numbers (out, in) and the largest magnitude of each row. `form` says the order of the numbers: by rows."""

    codes: TensorInfo
    scales: TensorInfo
    form: TensorInfo | None
    dtype: str
    rounds_to = "F16"

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scales) if self.form is None else (self.codes, self.scales, self.form)

    @property
    def width(self) -> int:
        return self.codes.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        codes = rows_of(self.codes, start, stop)[:]
        scales = _finite(self.scales, rows_of(self.scales, start, stop)[:])

        def decode(begin: int, end: int) -> Array:
            found = codes[begin:end].astype(np.float32)
            with np.errstate(over="ignore"):  # the caller sees what is not finite
                found *= scales[begin:end, None]
                found *= INVERSE_127
            return rounded(found, self.dtype)

        return decode

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        """As `Int8Params` of bitsandbytes does on a CPU: the float16 of the values, by rows."""
        import numpy as np

        codes, scales = np.empty(self.codes.shape, np.int8), np.empty(self.scales.shape, np.float32)
        step = max(1, BLOCK // max(1, self.width))
        for first in range(0, len(matrix), step):
            part = rounded(matrix[first : first + step].astype(np.float32), "F16").astype(np.float32)
            own = np.abs(part).max(1, initial=0)
            scales[first : first + step] = own
            part *= (np.divide(np.float32(1), own, out=np.zeros_like(own), where=own != 0) * np.float32(127))[:, None]
            with np.errstate(invalid="ignore"):
                codes[first : first + step] = np.rint(part, out=part)
        if not np.isfinite(scales).all():
            raise _wrong(self.codes, "becomes infinite or NaN as float16, of which bitsandbytes makes 8 bits")
        found: dict[str, Array] = {self.codes.name: codes, self.scales.name: scales}
        return found if self.form is None else found | {self.form.name: np.zeros(self.form.shape, np.uint8)}


@dataclass(frozen=True)
class Turned:
    """A matrix (in, out) of which the transpose is coded: a Conv1D's weight. Decoded whole; such models are small."""

    coding: Coding
    outputs: int
    dtype: str

    @property
    def rounds_to(self) -> str | None:
        return getattr(self.coding, "rounds_to", None)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.coding.stored

    @property
    def width(self) -> int:
        return self.outputs

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        decode = self.coding.open(rows_of, 0, self.outputs)
        found = np.empty((stop - start, self.outputs), numpy_dtype(self.dtype))
        step = max(1, BLOCK // self.coding.width)
        for first in range(0, self.outputs, step):
            last = min(first + step, self.outputs)
            found[:, first:last] = decode(first, last)[:, start:stop].T
        return lambda begin, end: found[begin:end]

    def written(self, tensors: Mapping[str, Array]) -> Turned:
        return replace(self, coding=self.coding.written(tensors)) if isinstance(self.coding, FourBitCodes) else self

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        import numpy as np

        assert isinstance(self.coding, (FourBitCodes, RowsOfInt8))
        return self.coding.encode(np.ascontiguousarray(matrix.T))


def _part(info: TensorInfo, rows_of: ReadRows, first: int, last: int) -> Array:
    """Elements [first, last) of a tensor, in its own order."""
    found: Array = rows_of(slice_of(info, first, last - first, (last - first,)), 0, last - first)[:]
    return found


def _finite(info: TensorInfo, values: Array) -> Array:
    import numpy as np

    if not np.isfinite(values).all():
        raise _wrong(info, "holds infinite or NaN values")
    return values


def _wrong(info: TensorInfo, what: str) -> CheckpointError:
    return CheckpointError(f"{info.path}: {info.name} {what}; the base is damaged, fetch it again")
