"""mxfp4, as gpt-oss is published: codes of 4 bits, and a power of two for each 32 of them.

    W[e, j, o] = value(code[e, o, j]) · 2^(scale[e, o, j // 32] - 127)      rounded once to the model's dtype

`X_blocks` (experts, out, in / 32, 16) uint8 has two codes in a byte, the lower bits first, and `X_scales` (experts,
out, in / 32) uint8 lies beside it. The parameter `X` (experts, in, out) has them transposed: some of its rows are
columns of the codes. Source: `convert_moe_packed_tensors` in transformers/integrations/mxfp4.py; for writing,
`quantize_to_mxfp4` there, which calls `downcast_to_mxfp_torch` of triton_kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fossil_export._patterns import PatternError, pattern_of
from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
"""Values that share a scale."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""

NOT_A_NUMBER = 255
"""The scale that float8_e8m0 has for NaN."""


@dataclass(frozen=True)
class Mxfp4:
    """Codes (experts, out, in / 32, 16) and scales (experts, out, in / 32) of a parameter (experts, in, out)."""

    codes: TensorInfo
    scales: TensorInfo
    dtype: str

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales

    @property
    def width(self) -> int:
        return self.codes.shape[1]

    @property
    def inputs(self) -> int:
        return self.codes.shape[2] * GROUP

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        values = np.array([*VALUES, *(-value for value in VALUES)], np.float32)
        lower, upper = values.take(np.arange(256) & 15), values.take(np.arange(256) >> 4)
        powers = np.ldexp(np.ones(NOT_A_NUMBER, np.float32), np.arange(NOT_A_NUMBER) - 127)
        panels = list(self._panels(rows_of, start, stop))
        dtype = numpy_dtype(self.dtype)

        def decode(first: int, last: int) -> Array:
            found = np.empty((last - first, self.width), dtype)
            for begin, codes, scales in panels:
                # The panel's rows that are asked for: rounded to groups, which have a scale of their own.
                low, high = max(first - begin, 0), min(last - begin, len(codes) * 2)
                for group in range(low // GROUP, -(-high // GROUP)):
                    own = codes[group * GROUP // 2 : (group + 1) * GROUP // 2]
                    block = np.empty((GROUP, self.width), np.float32)
                    top, end = max(low, group * GROUP), min(high, (group + 1) * GROUP)
                    rounded = found[begin + top - first : begin + end - first]
                    with np.errstate(over="ignore"):  # infinite values are the reader's to judge
                        np.multiply(lower.take(own), powers.take(scales[group]), out=block[::2])
                        np.multiply(upper.take(own), powers.take(scales[group]), out=block[1::2])
                        rounded[:] = block[top - group * GROUP : end - group * GROUP]
            return found

        return decode

    def _panels(self, rows_of: ReadRows, start: int, stop: int) -> Iterator[tuple[int, Array, Array]]:
        """For each expert of rows [start, stop): its first row, counted from `start`, codes (rows / 2, out), and scales
        (rows / 32, out)."""
        import numpy as np

        experts, outputs, groups, _ = self.codes.shape
        codes = replace(self.codes, shape=(experts * outputs, groups * GROUP // 2))
        scales = replace(self.scales, shape=(experts * outputs, groups))
        for expert in range(start // self.inputs, -(-stop // self.inputs)):
            before = expert * self.inputs
            low = max(start - before, 0) // GROUP
            high = -(-min(stop - before, self.inputs) // GROUP)
            rows = expert * outputs, (expert + 1) * outputs
            own = np.ascontiguousarray(rows_of(codes, *rows)[:, low * GROUP // 2 : high * GROUP // 2].T)
            powers = np.ascontiguousarray(rows_of(scales, *rows)[:, low:high].T)
            if (powers == NOT_A_NUMBER).any():
                raise CheckpointError(
                    f"{self.scales.path}: {self.scales.name} holds NaN (the scale 255); the base is damaged, fetch it "
                    "again"
                )
            yield before + low * GROUP - start, own, powers

    rounds_to = "BF16"

    @property
    def unit(self) -> int:
        return self.inputs

    def part(self, start: int, stop: int) -> Mxfp4:
        first, count = start // self.inputs, (stop - start) // self.inputs
        codes, scales = (_experts(info, first, count) for info in self.stored)
        return Mxfp4(codes, scales, self.dtype)

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        """As transformers quantizes: the least power of two with which all 32 values are at most 6, and the nearest
        code, of two equally near ones the larger. Values are rounded to bfloat16 before."""
        import numpy as np

        experts, outputs, groups, _ = self.codes.shape
        codes, scales = np.empty(self.codes.shape, np.uint8), np.empty(self.scales.shape, np.uint8)
        for expert in range(experts):
            own = matrix[expert * self.inputs : (expert + 1) * self.inputs].T
            # Some outputs at a time.
            step = max(1, (1 << 19) // self.inputs)
            for first in range(0, outputs, step):
                part = own[first : first + step].astype(numpy_dtype("BF16")).astype(np.float32)
                found = _encoded(part.reshape(-1, groups, GROUP))
                codes[expert, first : first + step], scales[expert, first : first + step] = found
        return {self.codes.name: codes, self.scales.name: scales}


def _experts(info: TensorInfo, first: int, count: int) -> TensorInfo:
    size = element_count(info.shape[1:])
    return slice_of(info, first * size, count * size, (count, *info.shape[1:]))


def _encoded(values: Array) -> tuple[Array, Array]:
    """Codes (…, 16) and scales (…) of values (…, 32) in float32."""
    import numpy as np

    signs = np.signbit(values).astype(np.uint8) << 3
    sizes = np.abs(values)
    bits = (sizes.max(-1) / np.float32(VALUES[-1])).view(np.uint32)
    exponents = (bits + np.uint32(0x7FFFFF)) >> 23
    powers = (exponents << 23).view(np.float32)
    with np.errstate(divide="ignore"):
        sizes *= np.where(powers == 0, 0, 1 / powers).astype(np.float32)[..., None]
    # From 1 on a code is the exponent and the first bit of the mantissa; below, halves are counted.
    large = ((sizes.view(np.uint32) + np.uint32(1 << 21)) >> 22) - np.uint32(252)
    found = np.where(sizes < 1, (sizes * 2 + np.float32(0.5)).astype(np.uint32), large)
    nibbles = np.minimum(found, 7).astype(np.uint8) | signs
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, exponents.astype(np.uint8)


class Mxfp4Format(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is not None:
            return stored.method == "mxfp4"
        return any(
            name.endswith(BLOCKS) and info.dtype == "U8" and info.shape[3:] == (GROUP // 2,)
            for name, info in stored.tensors.items()
        )

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        dtype = float_dtype(stored.config)
        kept = _kept(stored)
        for name, codes in stored.tensors.items():
            parameter = name.removesuffix(BLOCKS)
            if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in stored.tensors:
                raise stored.error(
                    codes, f"has no {name.removesuffix(SCALES)}{BLOCKS} beside it; fetch that file again"
                )
            if parameter == name:
                continue
            scales = stored.tensors.get(parameter + SCALES)
            if scales is None:
                raise stored.error(codes, f"has no {parameter}{SCALES} beside it; fetch that file again")
            if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != GROUP // 2:
                raise stored.error(codes, f"is {codes.dtype}, not bytes (experts, out, in / 32, 16); fetch it again")
            if scales.dtype != "U8" or scales.shape != codes.shape[:-1]:
                wanted = f"bytes {list(codes.shape[:-1])}, as its codes have it"
                raise stored.error(scales, f"is {scales.dtype}, and must be {wanted}; fetch it again")
            if kept is not None and kept(parameter.rpartition(".")[0]):
                raise stored.error(
                    codes, "is quantized, and modules_to_not_convert in config.json says that it is not; mend that"
                )
            experts, outputs, groups, _ = codes.shape
            yield coded(parameter, dtype, (experts, groups * GROUP, outputs), Mxfp4(codes, scales, dtype))


def _kept(stored: Stored) -> Any:
    """What tells whether a module is left as it is; None if all are quantized."""
    patterns = stored.names("modules_to_not_convert")
    if not patterns:
        return None
    try:
        # A whole module, by its beginning; as `should_convert_module` in transformers/quantizers has it.
        begins = [pattern_of(one, "(?:", r")(?:(?<=\.)|(?=\.|$))") for one in patterns]
    except PatternError as problem:
        raise stored.error("modules_to_not_convert", f"{problem}; mend it") from problem

    def kept(module: str) -> bool:
        try:
            return module.endswith(tuple(patterns)) or any(one.match(module) is not None for one in begins)
        except PatternError as problem:
            raise stored.error("modules_to_not_convert", f"{problem}; mend it") from problem

    return kept
