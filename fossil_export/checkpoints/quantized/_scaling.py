"""Values to codes and scales (`_scaled`), as the formats' libraries quantize without data: by what each block spans.

Source: `Fp8Quantize` in transformers/integrations/finegrained_fp8.py ("inverse"); `calculate_qparams`,
`generate_gparam` and `generate_mx_scales` in compressed_tensors/quantization/utils, and `_quantize` in
lifecycle/forward_helpers.py ("span", "powers").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import BLOCK
from fossil_export.checkpoints._dtypes import stored_dtype

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.quantized._scaled import Scaled

    Array = np.ndarray[Any, Any]

FP4_MAX = 6.0
FP8_MAX = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}


def encode(coding: Scaled, matrix: Array) -> dict[str, Array]:
    """The stored tensors of `coding` for other values (rows, width) in float32."""
    import numpy as np

    at = coding.rows_of_grid(0, len(matrix))
    low, high = _spans(coding, matrix, at)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales, zeros, overall, divisors = _parameters(coding, low, high)
        codes = _codes(coding, matrix, at, divisors, zeros)
    found = {coding.codes.name: codes.reshape(coding.codes.shape), coding.scales.name: scales}
    if coding.zeros is not None:
        found[coding.zeros.name] = zeros.astype(stored_dtype(coding.zeros.dtype))
    if coding.overall is not None:
        found[coding.overall.name] = overall
    shapes = {one.name: one.shape for one in coding.stored}
    return {name: np.ascontiguousarray(one).reshape(shapes[name]) for name, one in found.items()}


def _bands(coding: Scaled, rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, coding.width))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _spans(coding: Scaled, matrix: Array, at: Array) -> tuple[Array, Array]:
    """The least and the largest value of each block; zero is always between them."""
    import numpy as np

    low = np.zeros((int(at.max(initial=-1)) + 1, coding.grid[1]), np.float32)
    high = np.zeros_like(low)
    columns = np.arange(0, coding.width, coding.block[1])
    for first, last in _bands(coding, len(matrix)):
        own = at[first:last]
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        for operation, found in ((np.minimum, low), (np.maximum, high)):
            of_rows = operation.reduceat(operation.reduceat(matrix[first:last], columns, axis=1), starts, axis=0)
            found[own[starts]] = operation(found[own[starts]], of_rows)
    return low, high


def _parameters(coding: Scaled, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
    """(scales as they are stored, zero points, the factor of all, by what values are divided; multiplied, if the style
    is "inverse"; "ue8m0": by powers of two)."""
    import numpy as np

    dtype = stored_dtype(coding.scales.dtype)
    largest = np.maximum(-low, high)
    zeros, one = np.zeros_like(largest), np.ones(1, np.float32)
    top = largest_code(coding)
    if coding.style.startswith("inverse"):
        # A number by a tensor is a product with the inverse in PyTorch.
        forward = np.where(largest > 0, np.float32(1) / np.where(largest > 0, largest, 1) * np.float32(top), 1)
        inverse = np.float32(1) / forward
        if coding.style == "inverse ue8m0" or dtype.itemsize == 1:
            exponents = np.ceil(np.log2(np.maximum(inverse, np.finfo(np.float32).tiny)))
            return _powers(coding, exponents), zeros, one, _power(-exponents)
        stored = inverse.astype(dtype)
        # The library multiplies by what is not rounded; by the inverse of what is stored, if that is.
        return stored, zeros, one, forward if dtype.itemsize == 4 else np.float32(1) / stored.astype(np.float32)
    if coding.style == "powers":
        bits = largest.view(np.uint32).astype(np.int64) + (1 << 21) & 0xFF800000
        exponents = np.log2(bits.astype(np.uint32).view(np.float32)) - (2 if coding.packed else 8)
        exponents = np.clip(exponents, -127, 127)
        return _powers(coding, exponents), zeros, one, _power(exponents)
    if coding.symmetric:
        scales = largest / np.float32(top)
    else:
        least, most = code_range(coding)
        scales = (high - low) / np.float32(most - least)
        zeros = np.clip(np.float32(least) - np.where(scales > 0, low / scales, least), least, most)
        assert coding.zeros is not None
        kind = stored_dtype(coding.zeros.dtype)
        zeros = (np.rint(zeros) if kind.kind == "i" else zeros.astype(kind)).astype(np.float32)
    if coding.overall is None:
        stored = np.where(scales == 0, np.finfo(np.float32).eps, scales).astype(dtype)
        return stored, zeros, one, stored.astype(np.float32)
    most_of_all = np.maximum(largest.max(initial=0), np.finfo(np.float32).tiny)
    factor = np.float32(FP8_MAX["F8_E4M3"] * FP4_MAX) / most_of_all
    factor = np.float32(1) if not np.isfinite(factor) else factor
    own = np.clip(scales * factor, 0, FP8_MAX["F8_E4M3"]).astype(dtype)
    own = np.where(own.astype(np.float32) == 0, 0.125, own.astype(np.float32)).astype(dtype)
    overall = np.full(1, factor if coding.divides else np.float32(1) / factor, np.float32)
    wide = own.astype(np.float32)
    return own, zeros, overall, wide / overall if coding.divides else wide * overall


def _power(exponents: Array) -> Array:
    import numpy as np

    found: Array = np.ldexp(np.float32(1), exponents.astype(np.int32))
    return found


def _powers(coding: Scaled, exponents: Array) -> Array:
    """Powers of two as the scales are stored: as a float, or as one's exponent."""
    import numpy as np

    dtype = stored_dtype(coding.scales.dtype)
    if dtype.itemsize > 1:
        return _power(exponents).astype(dtype)
    found: Array = (exponents + 127).astype(np.uint8).view(dtype)
    return found


def code_range(coding: Scaled) -> tuple[float, float]:
    """The least and the largest code."""
    if coding.packed:
        return -FP4_MAX, FP4_MAX
    if coding.codes.dtype == "I8":
        return -(2.0 ** (coding.bits - 1)), 2.0 ** (coding.bits - 1) - 1
    return -FP8_MAX[coding.codes.dtype], FP8_MAX[coding.codes.dtype]


def largest_code(coding: Scaled) -> float:
    """What the largest value of a symmetric block becomes."""
    least, most = code_range(coding)
    return (most - least) / 2


def _codes(coding: Scaled, matrix: Array, at: Array, divisors: Array, zeros: Array) -> Array:
    import ml_dtypes
    import numpy as np

    from fossil_export.checkpoints.quantized._scaled import Spread

    least, most = code_range(coding)
    shape = (len(matrix), coding.codes.shape[-1])
    found = np.empty(shape, np.uint8)
    scale = Spread(divisors, at, coding.block, coding.width)
    operation = np.multiply if coding.style.startswith("inverse") else np.divide
    add = Spread(zeros, at, coding.block, coding.width) if zeros.any() else None
    for first, last in _bands(coding, len(matrix)):
        own = matrix[first:last].astype(np.float32)
        scale.apply(operation, own, first, last)
        if add is not None:
            add.apply(np.add, own, first, last)
        np.clip(own, least, most, out=own)
        if coding.packed:
            halves = own.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            found[first:last] = halves[:, ::2] | halves[:, 1::2] << 4
        elif coding.codes.dtype == "I8":
            found[first:last] = np.rint(own).astype(np.int8).view(np.uint8)
        else:
            found[first:last] = own.astype(stored_dtype(coding.codes.dtype)).view(np.uint8)
    return found.view(stored_dtype(coding.codes.dtype)) if coding.codes.dtype != "U8" else found
