"""What a quantized training saw of an unquantized base: its weights, quantized on loading and dequantized again.

    W' = dequantized(quantized(W as the model's dtype))

Training on quantized weights (QLoRA) fits W', not W. Sources: `Bnb4bitQuantize` and `Bnb8bitQuantize` in
transformers/integrations/bitsandbytes.py (a weight is cast to the model's dtype, then quantized),
`Fp8Quantize` in transformers/integrations/finegrained_fp8.py, and csrc/kernels.cu of bitsandbytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Coding, Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints._rounding import rounded
from fossil_export.checkpoints.quantized._blocks import NESTED, PIECE, magnitudes, nested, pieces, scale
from fossil_export.checkpoints.quantized._bnb_codes import Turned
from fossil_export.checkpoints.quantized._levels import (
    INVERSE_127,
    dynamic_map,
    numbers,
    reciprocal,
    scratch,
    taken,
    values_of,
)
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]


FP8_BLOCK = 128
FP8_MAX = 448.0

_LOCKS = tuple(threading.Lock() for _ in range(64))


@dataclass(frozen=True)
class TrainedOn:
    """How the weights of a base were quantized while an adapter was trained on it."""

    kind: str
    """A key of `QUANTIZERS`, or "unquantized"."""
    block_size: int = 64
    """Of nf4 and fp4."""
    double_quant: bool = False
    """Whether the scales of nf4 and fp4 were quantized too."""
    compute_dtype: str = "BF16"
    """The dtype that the model was loaded in: "BF16", "F16" or "F32". Weights are cast to it, quantized, and
    dequantized to it."""


@dataclass(frozen=True)
class FourBits:
    """A float tensor (…, in) as nf4 or fp4 has it: blocks of `block_size` elements in the tensor's own order, each
    with its largest magnitude as the scale; what CUDA makes of them, where CPUs round otherwise.

    With double quantization the scales' mean is rounded once from their exact sum. CUDA's sum in float32 may give one
    that differs in the last bit.
    """

    weight: TensorInfo
    seen: TrainedOn
    found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.weight,)

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        levels = values_of(self.seen.kind)
        offset = self._offset(rows_of) if self.seen.double_quant else None
        block = self.seen.block_size
        unit = block * (NESTED if offset is not None else 1)
        first = start * self.width // unit * unit
        last = min(-(-stop * self.width // unit) * unit, element_count(self.weight.shape))
        values = _values(self.weight, rows_of, first, last)
        ahead = start * self.width - first

        def decode(begin: int, end: int) -> Array:
            low, high = ahead + begin * self.width, ahead + end * self.width
            result = np.empty(high - low, numpy_dtype(self.seen.compute_dtype))
            for origin, limit in pieces(low, high, unit):
                part = self._cast(values[origin:limit])
                scales = magnitudes(part, block)
                self._check(scales)
                scale(part, reciprocal(scales), block)
                found = taken(levels, numbers(self.seen.kind, part), "values")
                if offset is not None:
                    scales = nested(scales, offset).scales(dynamic_map(), NESTED, offset)
                scale(found, scales, block)
                own = slice(max(origin, low), min(limit, high))
                result[own.start - low : own.stop - low] = rounded(
                    found[own.start - origin : own.stop - origin], self.seen.compute_dtype
                )
            return result.reshape(-1, self.width)

        return decode

    def _offset(self, rows_of: ReadRows) -> np.float32:
        """The mean of all scales, which double quantization takes off them: one pass over the tensor, once."""
        import numpy as np

        with _LOCKS[hash(self.weight.name) % len(_LOCKS)]:
            if "offset" not in self.found:
                count, block = element_count(self.weight.shape), self.seen.block_size
                step = max(1, PIECE // block) * block
                total = 0.0
                for first in range(0, count, step):
                    part = self._cast(_values(self.weight, rows_of, first, min(first + step, count)))
                    scales = magnitudes(part, block)
                    self._check(scales)
                    total += float(scales.sum(dtype=np.float64))
                self.found["offset"] = np.float32(total / max(1, -(-count // block)))
        found: np.float32 = self.found["offset"]
        return found

    def _cast(self, part: Array) -> Array:
        """As the model's dtype has it, in float32, in scratch memory."""
        import numpy as np

        found = scratch("cast", len(part), np.float32)
        np.copyto(found, narrowed(part, self.seen.compute_dtype), casting="unsafe")
        return found

    def _check(self, scales: Array) -> None:
        check(self.weight, scales, self.seen)


@dataclass(frozen=True)
class Int8:
    """A float tensor (…, in) as bitsandbytes has it in 8 bits: rows of whole numbers up to 127, each with its largest
    magnitude as the scale, all of it from the float16 of the model's dtype. (The threshold of outliers concerns
    activations, not weights.)"""

    weight: TensorInfo
    seen: TrainedOn

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.weight,)

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        values = _values(self.weight, rows_of, start * self.width, stop * self.width).reshape(-1, self.width)

        def decode(begin: int, end: int) -> Array:
            found = cast(cast(values[begin:end], self.seen.compute_dtype), "F16")
            scales = np.abs(found).max(1, initial=0)[:, None]
            check(self.weight, scales, self.seen)
            found *= reciprocal(scales) * np.float32(127)
            np.rint(found, out=found)
            found *= scales
            found *= INVERSE_127
            return rounded(found, self.seen.compute_dtype)

        return decode


@dataclass(frozen=True)
class Fp8Blocks:
    """A float tensor (…, out, in) as transformers' FineGrainedFP8 has it: float8_e4m3 in blocks of 128 × 128, each with
    a scale in float32; as it is, if such blocks do not divide it."""

    weight: TensorInfo
    seen: TrainedOn

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.weight,)

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import ml_dtypes
        import numpy as np

        whole = len(self.weight.shape) > 1 and not (self.weight.shape[-2] % FP8_BLOCK or self.width % FP8_BLOCK)
        unit = FP8_BLOCK if whole else 1
        first, last = start // unit * unit, -(-stop // unit) * unit
        values = _values(self.weight, rows_of, first * self.width, last * self.width).reshape(-1, self.width)
        ahead = start - first

        def decode(begin: int, end: int) -> Array:
            low, high = ahead + begin, ahead + end
            origin = low // unit * unit
            found = cast(values[origin : -(-high // unit) * unit], self.seen.compute_dtype)
            if whole:
                blocks = found.reshape(-1, unit, self.width // unit, unit)
                largest = np.abs(blocks).max((1, 3), keepdims=True)
                check(self.weight, largest, self.seen)
                # PyTorch's reciprocal is exact on CUDA too.
                scales = np.divide(np.float32(1), largest, out=np.ones_like(largest), where=largest > 0)
                scales[largest > 0] *= np.float32(FP8_MAX)
                blocks *= scales
                np.clip(blocks, -FP8_MAX, FP8_MAX, out=blocks)
                blocks[:] = blocks.astype(ml_dtypes.float8_e4m3fn)
                blocks *= np.float32(1) / scales
            return rounded(found[low - origin : high - origin], self.seen.compute_dtype)

        return decode


QUANTIZERS: dict[str, Callable[[TensorInfo, TrainedOn], Coding]] = {
    "nf4": FourBits,
    "fp4": FourBits,
    "int8": Int8,
    "fp8": Fp8Blocks,
}
"""By the kind of quantization: the weight (…, in) as training saw it, in `compute_dtype`, from the stored floats."""


@dataclass(frozen=True)
class OfConv1d:
    """The same for the weight (in, out) of a Conv1D, of which the transpose is quantized. It is read whole."""

    weight: TensorInfo
    seen: TrainedOn

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.weight,)

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        inputs, outputs = self.weight.shape
        matrix = np.ascontiguousarray(rows_of(self.weight, 0, inputs)[:].T).reshape(-1)

        def turned(info: TensorInfo, begin: int, end: int) -> Array:
            first = (info.offset or 0) // matrix.itemsize
            found: Array = matrix[first : first + element_count(info.shape)].reshape(info.shape)
            return found[begin:end]

        own = QUANTIZERS[self.seen.kind](replace(self.weight, shape=(outputs, inputs), offset=0), self.seen)
        return Turned(own, outputs, self.seen.compute_dtype).open(turned, start, stop)


AS_TRAINED = (FourBits, Int8, Fp8Blocks, OfConv1d)
"""The codings of weights as training saw them, which have the dtype that they are made of."""


def narrowed(part: Array, dtype: str) -> Array:
    """Floats as `dtype`; overflow gives infinities."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = part.astype(numpy_dtype(dtype), copy=False)
    return found


def cast(part: Array, dtype: str) -> Array:
    """The same in float32."""
    import numpy as np

    return narrowed(part, dtype).astype(np.float32)


def check(weight: TensorInfo, scales: Array, seen: TrainedOn) -> None:
    import numpy as np

    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{weight.path}: {weight.name} holds values that are not finite as {seen.compute_dtype}; it cannot have "
            f"been trained on as {seen.kind} in that dtype"
        )


def _values(weight: TensorInfo, rows_of: ReadRows, first: int, last: int) -> Array:
    """Elements [first, last) of a tensor, in its own order."""
    found: Array = rows_of(slice_of(weight, first, last - first, (last - first,)), 0, last - first)[:]
    return found
