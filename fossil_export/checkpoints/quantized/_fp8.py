"""Block-scaled fp8, as DeepSeek-V3 and Qwen publish: codes of 8 bits, one scale for each block of them.

    W[o, j] = code[o, j] · scale[o // rows, j // columns]      in float32, rounded once to the model's dtype

`X.weight` (out, in) float8_e4m3 has `X.weight_scale_inv` (⌈out / rows⌉, ⌈in / columns⌉) beside it; a tensor of experts
(n, out, in) has (n, …) of them. The last blocks may be cut. Scales are floats, or powers of two (float8_e8m0; or the
exponent plus 127, as uint8). Source: `Fp8Dequantize` in transformers/integrations/finegrained_fp8.py, and
`weight_dequant` in DeepSeek-V3's inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

SCALE = "_scale_inv"
CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
BLOCK = (128, 128)
"""The blocks of a config that names none."""


@dataclass(frozen=True)
class Blocks:
    """Codes (…, out, in) and their scales (…, ⌈out / block[0]⌉, ⌈in / block[1]⌉)."""

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    dtype: str

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales

    @property
    def width(self) -> int:
        return self.codes.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        outputs, width = self.codes.shape[-2:]
        blocks = self.scales.shape[-2]
        # Where the scales of each row are: a matrix of its own for each expert.
        numbers = np.arange(start, stop)
        at = numbers // outputs * blocks + numbers % outputs // self.block[0]
        codes = rows_of(_flat(self.codes), start, stop)[:].view(np.uint8)
        scales = self._scales(rows_of, int(at[0]), int(at[-1]) + 1)
        at -= at[0]
        values = np.arange(256, dtype=np.uint8).view(stored_dtype(self.codes.dtype)).astype(np.float32)
        whole = width % self.block[1] == 0

        def decode(first: int, last: int) -> Array:
            found = values.take(codes[first:last])
            own = scales[at[first:last]]
            if whole:
                found.reshape(len(own), -1, self.block[1])[:] *= own[:, :, None]
            else:
                found *= own.repeat(self.block[1], 1)[:, :width]
            rounded: Array = found.astype(numpy_dtype(self.dtype))
            return rounded

        return decode

    def _scales(self, rows_of: ReadRows, start: int, stop: int) -> Array:
        import numpy as np

        raw = rows_of(_flat(self.scales), start, stop)[:]
        found: Array = raw.astype(np.float32)
        if self.scales.dtype == "U8":
            found = np.exp2(found - 127)
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self.scales.path}: {self.scales.name} holds infinite or NaN values; the base is damaged, fetch it "
                "again"
            )
        return found


def _flat(info: TensorInfo) -> TensorInfo:
    """A tensor (…, n) as a matrix."""
    from fossil_export.checkpoints._header import slice_of

    count = element_count(info.shape)
    return slice_of(info, 0, count, (count // max(1, info.shape[-1]), info.shape[-1]))


class BlockFp8(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is not None:
            return stored.method == "fp8"
        return any(name.endswith(SCALE) for name in stored.tensors)

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        block = self._block(stored)
        dtype = float_dtype(stored.config)
        for name, codes in stored.tensors.items():
            if codes.dtype not in CODES:
                continue
            scales = stored.tensors.get(name + SCALE)
            if scales is None:
                raise stored.error(codes, f"has no {name}{SCALE} beside it; fetch that file again")
            if len(codes.shape) < 2 or scales.dtype not in SCALES:
                raise stored.error(scales, f"is stored as {scales.dtype}, and is no scale of {list(codes.shape)}")
            *lead, outputs, width = codes.shape
            wanted = (*lead, -(-outputs // block[0]), -(-width // block[1]))
            if scales.shape != wanted:
                raise stored.error(
                    scales, f"must be {list(wanted)} for blocks of {block[0]} × {block[1]}; fetch it again"
                )
            yield coded(name, dtype, codes.shape, Blocks(codes, scales, block, dtype))

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        """Scales of activations."""
        return info.name.endswith(("activation_scale", "input_scale"))

    def _block(self, stored: Stored) -> tuple[int, int]:
        found = (stored.settings or {}).get("weight_block_size", BLOCK)
        sizes = found if isinstance(found, (list, tuple)) else ()
        if len(sizes) != 2 or not all(type(one) is int and one > 0 for one in sizes):
            raise stored.error("weight_block_size", f"is {found!r} in config.json, not two sizes; mend it")
        return sizes[0], sizes[1]
