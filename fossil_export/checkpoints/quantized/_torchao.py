"""torchao's tensors in safetensors files: whole numbers or short floats, one scale for each block of them.

    W[i] = (code[i] - zero[block of i]) · scale[block of i]      in float32, rounded once to the tensor's dtype

The header's metadata says of each weight `M.x` which class it is of ("_type"), its fields ("_data") and the tensors it
is made of, which are called `M._x_qdata`, `M._x_scale`, `M._x_zero_point`. A block is a part of every dimension. The
codes of MXTensor in 4 bits are two to a byte, the lower bits first. Source: `flatten_tensor_state_dict` in
torchao/prototype/safetensors, and `dequantize` of the classes in torchao/quantization/quantize_/workflows and
torchao/prototype/mx_formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

CODES: dict[str, tuple[str, ...]] = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
    "MXTensor": ("F8_E4M3", "F8_E5M2", "U8"),
}
"""The dtypes of the codes, for the classes that are read."""

REFUSED = {
    "Int4Tensor": "whose values its GPU kernels alone tell",
    "Int4TilePackedTo4dTensor": "which is packed for one kind of GPU",
    "Int4PlainInt32Tensor": "which is packed for one kind of device",
    "NVFP4Tensor": "whose scales are stored for one kind of GPU",
}
ACTIVATIONS = ("_act_quant_scale", "_act_quant_zero_point")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a code of MXTensor in 4 bits stand for; the fourth is the sign."""

_PEFT = "run the adapter beside it, with PEFT"
_AGAIN = "load it with transformers, put what dequantize() of its weights gives in their place, and save that"


@dataclass(frozen=True)
class Scaled:
    """Codes of a tensor of this `shape`, a `grid` of scales (as many dimensions), and a zero for each, if there are
    any."""

    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    dtype: str

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    @property
    def width(self) -> int:
        return self.shape[-1]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        import numpy as np

        # Where the scales of each row are.
        at = np.unravel_index(np.arange(start, stop), self.shape[:-1])
        sizes = [size // count for size, count in zip(self.shape, self.grid, strict=True)]
        own = np.ravel_multi_index(tuple(one // size for one, size in zip(at, sizes, strict=False)), self.grid[:-1])
        first, last = int(own[0]), int(own[-1]) + 1
        own -= first
        codes = rows_of(_matrix(self.codes, element_count(self.shape[:-1])), start, stop)[:].view(np.uint8)
        values = self._values()
        scales = self._blocks(self.scales, rows_of, first, last)
        zeros = None if self.zeros is None else self._blocks(self.zeros, rows_of, first, last)
        plain = zeros is None or not zeros.any()

        def decode(start: int, stop: int) -> Array:
            some = codes[start:stop]
            if self.codes.dtype == "U8":
                some = np.stack([some & 15, some >> 4], -1).reshape(len(some), -1)
            found = values.take(some)
            blocks = found.reshape(len(found), self.grid[-1], sizes[-1])
            with np.errstate(over="ignore", invalid="ignore"):  # the caller sees what is not finite
                if zeros is not None and not plain:
                    blocks -= zeros[own[start:stop], :, None]
                blocks *= scales[own[start:stop], :, None]
                rounded: Array = found.astype(numpy_dtype(self.dtype))
            return rounded

        return decode

    def _values(self) -> Array:
        """What each byte stands for."""
        import numpy as np

        if self.codes.dtype == "U8":
            return np.array([*HALVES, *(-one for one in HALVES)], np.float32)
        found: Array = np.arange(256, dtype=np.uint8).view(stored_dtype(self.codes.dtype)).astype(np.float32)
        return found

    def _blocks(self, info: TensorInfo, rows_of: ReadRows, first: int, last: int) -> Array:
        import numpy as np

        found: Array = rows_of(_matrix(info, element_count(self.grid[:-1])), first, last)[:].astype(np.float32)
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{info.path}: {info.name} holds infinite or NaN values; the base is damaged, fetch it again"
            )
        return found


def _matrix(info: TensorInfo, rows: int) -> TensorInfo:
    """A whole tensor as this many rows."""
    count = element_count(info.shape)
    return slice_of(info, 0, count, (rows, count // max(1, rows)))


class TorchAo(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is not None:
            return stored.method == "torchao"
        return "tensor_names" in stored.metadata and any(True for _ in _described(stored))

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        found = list(_described(stored))
        if not found:
            raise stored.error(
                "the header of its files",
                f"does not tell how torchao quantized it, as since torchao 0.15; {_AGAIN}",
            )
        taken: set[str] = set()
        for name, kind, fields, names in found:
            for one in _weight(name, kind, fields, names, stored):
                assert one.coding is not None
                taken.update(info.name for info in one.coding.stored)
                yield one
        for name, info in stored.tensors.items():
            if name.endswith("_qdata") and name.rpartition(".")[2].startswith("_") and name not in taken:
                raise stored.error(info, f"is of a weight that the header of its file does not describe; {_AGAIN}")

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        return info.name.endswith(ACTIVATIONS)

    def plain_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        # Not parsed: each of many files may describe all tensors.
        own = {"tensor_names", *(name for name, text in metadata.items() if text.startswith('{"_type"'))}
        return {name: text for name, text in metadata.items() if name not in own}


def _described(stored: Stored) -> Iterator[tuple[str, str, Mapping[str, Any], list[str]]]:
    """For each weight of a class of torchao's: its name, the class, its fields and what its tensors are called."""
    for name, text in stored.metadata.items():
        entry = _entry(text) if name != "tensor_names" else None
        if entry is None or entry["_type"] == "Tensor":
            continue
        fields, names = entry.get("_data"), entry.get("_tensor_data_names")
        if not isinstance(fields, dict) or not isinstance(names, list):
            raise stored.error(
                name, f"is described as {text[:80]} in the header of a file, which is no {entry['_type']}"
            )
        yield name, entry["_type"], fields, names


def _entry(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("_type"), str) else None


def _weight(name: str, kind: str, fields: Mapping[str, Any], names: list[str], stored: Stored) -> Iterator[TensorInfo]:
    if kind not in CODES:
        why = REFUSED.get(kind, "which is not known here")
        raise stored.error(name, f"is torchao's {kind}, {why}; {_PEFT if kind in REFUSED else _AGAIN}")
    module, _, own = name.rpartition(".")
    prefix = f"{module}._{own}_" if module else f"_{own}_"
    parts = {}
    for part in names:
        info = stored.tensors.get(f"{prefix}{part}")
        if info is None:
            raise stored.error(name, f"has no {prefix}{part}, which the header of its file names; fetch it again")
        parts[part] = info
    if "act_pre_scale" in parts:
        raise stored.error(
            parts["act_pre_scale"], f"multiplies what goes into {name}, which no plain weight can do; {_PEFT}"
        )
    missing = [part for part in ("qdata", "scale") if part not in parts]
    if missing:
        raise stored.error(name, f"is {kind} without {missing[0]}; fetch its file again")
    codes, scales, zeros = parts["qdata"], parts["scale"], parts.get("zero_point")
    if codes.dtype not in CODES[kind]:
        raise stored.error(codes, f"is stored as {codes.dtype}, and is no {kind}; fetch it again")
    if scales.dtype not in SCALES:
        raise stored.error(scales, f"is stored as {scales.dtype}, and is no scale; fetch it again")
    dtype = BY_TORCH_NAME.get(str(_value(fields.get("orig_dtype" if kind == "MXTensor" else "dtype"))))
    if dtype not in ("F32", "F16", "BF16"):
        raise stored.error(name, f"is {kind} of an unknown dtype in the header of its file; {_AGAIN}")
    if kind == "MXTensor":
        _check_mx(name, codes, fields, dtype, stored)
    shape = codes.shape if codes.dtype != "U8" else (*codes.shape[:-1], codes.shape[-1] * 2)
    grid = _grid(name, kind, shape, fields.get("block_size"), scales, stored)
    if zeros is not None and element_count(zeros.shape) != element_count(grid):
        raise stored.error(zeros, f"must have {element_count(grid)} values, one for each scale; fetch it again")
    if zeros is not None and zeros.dtype not in ("I8", "I32", "I64"):
        raise stored.error(zeros, f"is stored as {zeros.dtype}, and is no whole number; {_AGAIN}")
    yield coded(name, dtype, shape, Scaled(codes, scales, zeros, shape, grid, dtype))


def _check_mx(name: str, codes: TensorInfo, fields: Mapping[str, Any], dtype: str, stored: Stored) -> None:
    wanted = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U8": "float4_e2m1fn_x2"}[codes.dtype]
    if fields.get("is_swizzled_scales") is not False:
        raise stored.error(name, f"is MXTensor whose scales are stored for one kind of GPU; {_PEFT}")
    if _value(fields.get("elem_dtype")) != wanted or dtype == "F16":
        raise stored.error(
            codes, f"is MXTensor of {_value(fields.get('elem_dtype'))} and {dtype}, which is not known here; {_AGAIN}"
        )


def _grid(
    name: str, kind: str, shape: tuple[int, ...], block: Any, scales: TensorInfo, stored: Stored
) -> tuple[int, ...]:
    """How many scales there are in every dimension."""
    if kind == "MXTensor" and type(block) is int:
        block = [1] * (len(shape) - 1) + [block]
    if block is None and kind == "Float8Tensor" and len(scales.shape) == len(shape) and 0 not in scales.shape:
        block = [size // count for size, count in zip(shape, scales.shape, strict=True)]
    sizes = block if isinstance(block, list) and all(type(one) is int and one > 0 for one in block) else []
    if len(shape) < 2 or len(sizes) != len(shape) or any(one % size for one, size in zip(shape, sizes, strict=True)):
        raise stored.error(
            name, f"is {kind} {list(shape)} in blocks of {block!r}, which do not divide it; fetch it again"
        )
    grid = tuple(one // size for one, size in zip(shape, sizes, strict=True))
    if element_count(scales.shape) != element_count(grid) or (kind == "Float8Tensor" and _other(scales.shape, grid)):
        raise stored.error(scales, f"must be {list(grid)} for blocks of {sizes}; fetch it again")
    return grid


def _other(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether scales of this shape are spread in another way than by the grid."""
    return shape != grid and element_count(shape) > 1


def _value(field: Any) -> Any:
    """What a field stands for that is written with its type."""
    return field.get("_data") if isinstance(field, dict) else field
