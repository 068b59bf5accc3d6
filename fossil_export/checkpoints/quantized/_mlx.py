"""MLX's affine codes: whole numbers of a few bits, with a scale and a bias for each group of a row.

    W[o, j] = code[o, j] · scale[o, j // group] + bias[o, j // group]

`X.weight` (…, out, in · bits / 32) uint32 is a stream of codes, the lowest bits first; `X.scales` and `X.biases`
(…, out, in / group) have the dtype of the weight. As mlx-lm saves it, the product is rounded to that dtype, and so is
the sum (`mx.dequantize` on a CPU); as transformers does for Metal (`X.qbiases`), the sum is rounded, once. Sources:
https://ml-explore.github.io/mlx (quantize), and transformers/integrations/metal_quantization.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

BITS = (2, 3, 4, 5, 6, 8)
MODES = ("mxfp4", "mxfp8", "nvfp4")
"""What MLX has besides, and is not read."""

_OUT = "load it with mlx-lm, dequantize and save it (mlx_lm convert --dequantize), and merge into that"


@dataclass(frozen=True)
class Affine:
    """Codes (…, out, in · bits / 32), and scales and biases (…, out, in / group); `once`: what is added is not rounded
    before."""

    codes: TensorInfo
    scales: TensorInfo
    biases: TensorInfo
    bits: int
    once: bool

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.biases

    @property
    def width(self) -> int:
        return self.codes.shape[-1] * 32 // self.bits

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        codes = np.ascontiguousarray(rows_of(_flat(self.codes), start, stop)[:]).astype("<u4", copy=False)
        stream = codes.view(np.uint8).reshape(stop - start, -1)
        scales, biases = (self._group(info, rows_of, start, stop) for info in (self.scales, self.biases))
        dtype = numpy_dtype(self.scales.dtype)

        def decode(first: int, last: int) -> Array:
            found = _unpacked(stream[first:last], self.bits).astype(np.float32)
            groups = found.reshape(last - first, scales.shape[1], -1)
            with np.errstate(over="ignore", invalid="ignore"):  # the caller sees what is not finite
                groups *= scales[first:last, :, None]
                if not self.once and dtype != np.float32:
                    groups[:] = groups.astype(dtype)
                groups += biases[first:last, :, None]
                rounded: Array = found.astype(dtype)
            return rounded

        return decode

    def _group(self, info: TensorInfo, rows_of: ReadRows, start: int, stop: int) -> Array:
        import numpy as np

        found: Array = rows_of(_flat(info), start, stop)[:].astype(np.float32)
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{info.path}: {info.name} holds infinite or NaN values; the base is damaged, fetch it again"
            )
        return found

    @property
    def rounds_to(self) -> str:
        return self.scales.dtype

    @property
    def unit(self) -> int:
        return 1

    def part(self, start: int, stop: int) -> Affine:
        codes, scales, biases = (_rows(_flat(info), start, stop) for info in self.stored)
        return Affine(codes, scales, biases, self.bits, self.once)

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        """As MLX quantizes on a CPU (`mx.quantize`), or as transformers does for Metal; values are rounded to the dtype
        of the scales before."""
        import numpy as np

        dtype = numpy_dtype(self.scales.dtype)
        shape = len(matrix), self.scales.shape[-1]
        codes = np.empty((len(matrix), self.width * self.bits // 8), np.uint8)
        scales, biases = np.empty(shape, dtype), np.empty(shape, dtype)
        step = max(1, (1 << 19) // self.width)
        for first in range(0, len(matrix), step):
            part = matrix[first : first + step].astype(dtype).astype(np.float32)
            groups = part.reshape(len(part), shape[1], -1)
            scale, bias = (_of_metal if self.once else _of_mlx)(groups, (1 << self.bits) - 1)
            groups -= bias[..., None]
            groups /= scale[..., None]
            found = np.clip(np.rint(groups), 0, (1 << self.bits) - 1).astype(np.uint8)
            codes[first : first + step] = _packed(found.reshape(len(part), -1), self.bits)
            scales[first : first + step], biases[first : first + step] = scale.astype(dtype), bias.astype(dtype)
        return {
            self.codes.name: codes.view("<u4").reshape(self.codes.shape),
            self.scales.name: scales.reshape(self.scales.shape),
            self.biases.name: biases.reshape(self.biases.shape),
        }


def _of_mlx(groups: Array, most: int) -> tuple[Array, Array]:
    """Scales and biases: the end of a group that is further from zero is a whole number of steps from it."""
    import numpy as np

    low, high = groups.min(-1), groups.max(-1)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32(most), np.float32(1e-7))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(steps == 0, scale, edge / steps), np.where(steps == 0, np.float32(0), edge)


def _of_metal(groups: Array, most: int) -> tuple[Array, Array]:
    import numpy as np

    low = groups.min(-1)
    return np.maximum((groups.max(-1) - low) / np.float32(most), np.float32(1e-8)), low


def _packed(codes: Array, bits: int) -> Array:
    """Bytes (rows, n · bits / 8) of codes (rows, n): the inverse of `_unpacked`."""
    import numpy as np

    if bits in (2, 4, 8):
        parts = codes.reshape(len(codes), -1, 8 // bits)
        whole: Array = np.bitwise_or.reduce(parts << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)
        return whole
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint64)
    for at in range(8):
        words |= codes[:, at::8].astype(np.uint64) << np.uint64(bits * at)
    found = np.empty((*words.shape, bits), np.uint8)
    for at in range(bits):
        found[:, :, at] = words >> np.uint64(8 * at) & np.uint64(255)
    return found.reshape(len(codes), -1)


def _unpacked(stream: Array, bits: int) -> Array:
    """Codes (rows, n) of bytes (rows, n · bits / 8)."""
    import numpy as np

    mask = (1 << bits) - 1
    if bits in (2, 4, 8):
        return np.stack([stream >> at & mask for at in range(0, 8, bits)], -1).reshape(len(stream), -1)
    # Eight codes are as many bytes as one has bits.
    parts = stream.reshape(len(stream), -1, bits)
    whole = np.zeros(parts.shape[:2], np.uint64)
    for at in range(bits):
        whole |= parts[:, :, at].astype(np.uint64) << np.uint64(8 * at)
    found = np.empty((*whole.shape, 8), np.uint8)
    for at in range(8):
        found[:, :, at] = whole >> np.uint64(bits * at) & np.uint64(mask)
    return found.reshape(len(stream), -1)


def _flat(info: TensorInfo) -> TensorInfo:
    """A tensor (…, n) as a matrix."""
    count = element_count(info.shape)
    return slice_of(info, 0, count, (element_count(info.shape[:-1]), info.shape[-1]))


def _rows(matrix: TensorInfo, start: int, stop: int) -> TensorInfo:
    width = matrix.shape[1]
    return slice_of(matrix, start * width, (stop - start) * width, (stop - start, width))


class Mlx(BaseFormat):
    """As mlx-lm saves it: a config has `quantization`, and `quantization_config` too, in which no method is named."""

    def describes(self, stored: Stored) -> bool:
        if stored.method is not None:
            return False
        if _settings(stored) is not None:
            return True
        return stored.settings is None and any(
            info.dtype == "U32"
            and name.endswith(".weight")
            and f"{name.removesuffix('weight')}biases" in stored.tensors
            for name, info in stored.tensors.items()
        )

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        settings = _settings(stored)
        if settings is None:
            raise stored.error("config.json", "is not there to say how its weights are quantized; name their folder")
        for name in list(stored.tensors):
            module = name.removesuffix(".scales")
            if module == name:
                continue
            own = settings.get(module)
            own = {**settings, **own} if isinstance(own, dict) else settings
            yield _weight(module, f"{module}.biases", own, False, stored)
        _check_alone("biases", stored)

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in super().plain_config(config).items() if name != "quantization"}


class Metal(BaseFormat):
    """As transformers saves it, for Metal."""

    def describes(self, stored: Stored) -> bool:
        return stored.method == "metal"

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        for name in list(stored.tensors):
            module = name.removesuffix(".scales")
            if module != name:
                yield _weight(module, f"{module}.qbiases", stored.settings or {}, True, stored)
        _check_alone("qbiases", stored)


def _settings(stored: Stored) -> Mapping[str, Any] | None:
    for part in (stored.config.get("quantization"), stored.settings):
        if isinstance(part, dict) and {"bits", "group_size"} <= part.keys():
            return part
    return None


def _check_alone(kind: str, stored: Stored) -> None:
    """Raise CheckpointError for integers or biases of a weight that has no scales."""
    for name, info in stored.tensors.items():
        module, _, last = name.rpartition(".")
        if (info.dtype == "U32" or last == kind) and f"{module}.scales" not in stored.tensors:
            raise stored.error(info, f"has no {module}.scales beside it; fetch that file again")


def _weight(module: str, biases_name: str, settings: Mapping[str, Any], once: bool, stored: Stored) -> TensorInfo:
    codes, scales = stored.tensors.get(f"{module}.weight"), stored.tensors[f"{module}.scales"]
    biases = stored.tensors.get(biases_name)
    if codes is None:
        raise stored.error(scales, f"has no {module}.weight beside it; fetch that file again")
    mode = settings.get("mode") or "affine"
    if mode != "affine":
        known = "which is not read here" if mode in MODES else "which is not known"
        raise stored.error(codes, f"is quantized with MLX's mode {mode!r}, {known}; {_OUT}")
    bits, group = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in BITS or type(group) is not int or group < 1:
        raise stored.error(codes, f"has {bits!r} bits in groups of {group!r}, by config.json; mend it")
    if biases is None:
        raise stored.error(codes, f"has no {biases_name} beside it; fetch that file again")
    if codes.dtype != "U32" or len(codes.shape) < 2:
        raise stored.error(codes, f"is stored as {codes.dtype}, and has {module}.scales beside it; fetch it again")
    width = codes.shape[-1] * 32 // bits
    wanted = (*codes.shape[:-1], width // group)
    if codes.shape[-1] * 32 % bits or width % group or width * bits % 8 or (bits in (3, 5, 6) and width % 8):
        raise stored.error(codes, f"is no whole number of groups of {group} codes of {bits} bits; mend config.json")
    for info in (scales, biases):
        if info.shape != wanted or info.dtype != scales.dtype or info.dtype not in ("F32", "F16", "BF16"):
            raise stored.error(
                info, f"is {info.dtype}, and must be {scales.dtype} {list(wanted)} for groups of {group} codes of "
                f"{bits} bits; fetch it again, with its config.json"
            )  # fmt: skip
    name = f"{module}.weight"
    return coded(name, scales.dtype, (*codes.shape[:-1], width), Affine(codes, scales, biases, bits, once))
