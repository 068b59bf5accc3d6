"""What a quantized training saw of an unquantized base: its weights, quantized on loading and dequantized again.

    W' = dequantized(quantized(W as the model's dtype))

Training on quantized weights (QLoRA) fits W', not W. Sources: `Bnb4bitQuantize` and `Bnb8bitQuantize` in
transformers/integrations/bitsandbytes.py (a weight is cast to the model's dtype, then quantized),
`Fp8Quantize` in transformers/integrations/finegrained_fp8.py, and csrc/kernels.cu of bitsandbytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import BLOCK, Coding, Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.quantized._levels import dynamic_map, nearest, numbers, values_of
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

NESTED = 256
"""Scales that have one scale of their own, in double quantization."""

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
    with its largest magnitude as the scale."""

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
        offset = self._offset(rows_of) if self.seen.double_quant else None
        block = self.seen.block_size
        unit = block * (NESTED if offset is not None else 1)
        first = start * self.width // unit * unit
        last = min(-(-stop * self.width // unit) * unit, element_count(self.weight.shape))
        values = _values(self.weight, rows_of, first, last)
        ahead = start * self.width - first

        def decode(begin: int, end: int) -> Array:
            low, high = ahead + begin * self.width, ahead + end * self.width
            origin = low // unit * unit
            part = self._cast(values[origin : min(-(-high // unit) * unit, len(values))])
            scales = _magnitudes(part, block)
            self._check(scales)
            scaled(part, inverse(scales), block)
            found = values_of(self.seen.kind).take(numbers(self.seen.kind, part))
            if offset is not None:
                scales = quantized_scales(scales, offset)
            scaled(found, scales, block)
            rounded: Array = found[low - origin : high - origin].astype(numpy_dtype(self.seen.compute_dtype))
            return rounded.reshape(-1, self.width)

        return decode

    def _offset(self, rows_of: ReadRows) -> np.float32:
        """The mean of all scales, which double quantization takes off them: one pass over the tensor, once."""
        import numpy as np

        with _LOCKS[hash(self.weight.name) % len(_LOCKS)]:
            if "offset" not in self.found:
                count, block = element_count(self.weight.shape), self.seen.block_size
                step = max(1, BLOCK // block) * block
                total = 0.0
                for first in range(0, count, step):
                    part = self._cast(_values(self.weight, rows_of, first, min(first + step, count)))
                    scales = _magnitudes(part, block)
                    self._check(scales)
                    total += float(scales.sum(dtype=np.float64))
                self.found["offset"] = np.float32(total / max(1, -(-count // block)))
        found: np.float32 = self.found["offset"]
        return found

    def _cast(self, part: Array) -> Array:
        """As the model's dtype has it, in float32."""
        return cast(part, self.seen.compute_dtype)

    def _check(self, scales: Array) -> None:
        check(self.weight, scales, self.seen)


def four_bits(weight: TensorInfo, seen: TrainedOn) -> Coding:
    return FourBits(weight, seen)


QUANTIZERS: dict[str, Callable[[TensorInfo, TrainedOn], Coding]] = {"nf4": four_bits, "fp4": four_bits}
"""By the kind of quantization: the weight (…, in) as training saw it, in `compute_dtype`, from the stored floats."""


def cast(part: Array, dtype: str) -> Array:
    """Floats as `dtype` has them, in float32; overflow gives infinities."""
    import numpy as np

    target = numpy_dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if part.dtype != target:
            part = part.astype(target)
        found: Array = part.astype(np.float32)
    return found


def check(weight: TensorInfo, scales: Array, seen: TrainedOn) -> None:
    import numpy as np

    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{weight.path}: {weight.name} holds values that are not finite as {seen.compute_dtype}; it cannot have "
            f"been trained on as {seen.kind} in that dtype"
        )


def quantized_scales(scales: Array, offset: np.float32) -> Array:
    """Scales, of which the first begins a block of `NESTED`, quantized to 8 bits and dequantized again."""
    left = scales - offset
    outer = _magnitudes(left, NESTED)
    table = dynamic_map()
    scaled(left, inverse(outer), NESTED)
    found: Array = table[nearest(left, table)]
    scaled(found, outer, NESTED)
    found += offset
    return found


def inverse(scales: Array) -> Array:
    """What blocks are multiplied by to lie between -1 and 1; a block of zeros stays what it is."""
    import numpy as np

    found: Array = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    return found


def scaled(values: Array, scales: Array, block: int) -> None:
    """Multiply each block of a vector by its scale, in place; the last block may be cut."""
    whole = len(values) // block
    values[: whole * block].reshape(whole, block)[:] *= scales[:whole, None]
    if whole < len(scales):
        values[whole * block :] *= scales[whole]


def _magnitudes(values: Array, block: int) -> Array:
    """The largest magnitude of each block of a vector; the last block may be cut."""
    import numpy as np

    whole = len(values) // block
    blocks = values[: whole * block].reshape(whole, block)
    found = np.empty(-(-len(values) // block), np.float32)
    np.maximum(blocks.max(1), -blocks.min(1), out=found[:whole])
    if whole < len(found):
        found[whole] = np.abs(values[whole * block :]).max()
    return found


def _values(weight: TensorInfo, rows_of: ReadRows, first: int, last: int) -> Array:
    """Elements [first, last) of a tensor, in its own order."""
    found: Array = rows_of(slice_of(weight, first, last - first, (last - first,)), 0, last - first)[:]
    return found
