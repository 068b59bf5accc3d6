"""A constant matrix of a graph, seen as the (out, in) weight of a linear layer however it is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.errors import OnnxError

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

SAFETENSORS_NAME = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "DOUBLE": "F64"}
"""Of ONNX's float types, by their ONNX names."""

FLOAT_NAMES = tuple(SAFETENSORS_NAME)


@dataclass(frozen=True)
class Weight:
    """The constant operand of a product.

    `value` is the initializer that holds it; `outputs` and `inputs` are the
    layer's; `transposed` means that the product reads it as (in, out); `direct` that the product reads the
    initializer itself, with no node between; `bits` is the width of a quantized weight, None for a float one.
    """

    value: ir.Value
    outputs: int
    inputs: int
    transposed: bool
    direct: bool
    bits: int | None
    read: Callable[[Any], Array]
    """`read(rows)` gives these rows of the (out, in) weight as float32; `rows` is a slice or an index array."""
    spacing: Callable[[Any], Array] | None = None
    """Of a quantized weight: the distance between neighbouring codes, for the same rows and of their shape."""

    @property
    def dtype(self) -> str:
        """ONNX's name of the stored type: "FLOAT", "FLOAT16", "UINT8"…"""
        return str(self.value.dtype.name)


def stored(tensor: Any) -> Array:
    """The values of an initializer; external data is mapped, not read.

    onnx_ir refuses files with several hard links, as an attacker might plant them; the data file of a shared base
    has them by design, and its path was checked when the graph was loaded.
    """
    values: Array = np.asarray(unguarded(tensor).numpy())
    return values


def unguarded(tensor: Any) -> Any:
    """`tensor`, read by its absolute path if it is external."""
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    path = (Path(tensor.base_dir) / tensor.location).absolute()
    return ir.ExternalTensor(path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name)


def round_to(values: Array, dtype: str, what: str) -> Array:
    """`values` as ONNX's float type `dtype`. Raises OnnxError where they do not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(numpy_dtype(SAFETENSORS_NAME[dtype]))
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise OnnxError(f"{what} does not fit {dtype}; use a wider --precision")
    return rounded


def float_weight(value: ir.Value, transposed: bool, direct: bool) -> Weight | None:
    """The weight in a float initializer that a MatMul (`transposed`) or a Gemm with transB reads."""
    tensor = value.const_value
    if tensor is None or tensor.dtype.name not in FLOAT_NAMES or len(tensor.shape) != 2:
        return None
    first, second = (int(size) for size in tensor.shape)

    def read(rows: Any) -> Array:
        whole = stored(tensor)
        found: Array = np.asarray(whole[:, rows].T if transposed else whole[rows], np.float32)
        return found

    outputs, inputs = (second, first) if transposed else (first, second)
    return Weight(value, outputs, inputs, transposed, direct, None, read)


def block_weight(node: ir.Node) -> Weight | None:
    """The weight of a MatMulNBits node: (N, blocks, bytes) packed along K, low bits first.

    Source: the operator's page in ONNX Runtime's docs/ContribOperators.md.
    """
    sizes = {name: node.attributes[name].as_int() for name in ("K", "N", "block_size") if name in node.attributes}
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    operands = [_constant(node, index) for index in range(1, min(5, len(node.inputs)))]
    operands += [None] * (4 - len(operands))
    packed, scales, zeros, order = operands
    if len(sizes) < 3 or packed is None or scales is None or bits not in (2, 4, 8):
        return None
    if order is not None or (len(node.inputs) > 3 and node.inputs[3] is not None and zeros is None):
        return None  # columns out of order, or zero points computed in the graph
    inputs, outputs, block = sizes["K"], sizes["N"], sizes["block_size"]
    if min(inputs, outputs, block) < 1 or packed.dtype.name != "UINT8":
        return None
    blocks = -(-inputs // block)
    if packed.size * 8 != outputs * blocks * block * bits or scales.size != outputs * blocks:
        return None  # not what its numbers say
    if zeros is not None and zeros.size != outputs * (
        -(-blocks * bits // 8) if zeros.dtype.name == "UINT8" else blocks
    ):
        return None

    def unpacked(data: Array, count: int) -> Array:
        lanes = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        whole: Array = np.stack(lanes, -1).reshape(len(data), -1)[:, :count].astype(np.float32)
        return whole

    def read(rows: Any) -> Array:
        data = stored(packed).reshape(outputs, -1)[rows]
        codes = unpacked(data, blocks * block).reshape(len(data), blocks, block)
        scale = stored(scales).reshape(outputs, blocks)[rows].astype(np.float32)
        zero: Any = float(1 << (bits - 1))
        if zeros is not None:
            points = stored(zeros).reshape(outputs, -1)[rows]
            zero = (unpacked(points, blocks) if points.dtype == np.uint8 else points.astype(np.float32))[:, :, None]
        wide: Array = ((codes - zero) * scale[:, :, None]).reshape(len(data), -1)[:, :inputs]
        return wide

    def spacing(rows: Any) -> Array:
        scale = np.abs(stored(scales).reshape(outputs, blocks)[rows].astype(np.float32))
        wide: Array = np.repeat(scale, block, axis=1)[:, :inputs]
        return wide

    return Weight(node.inputs[1], outputs, inputs, False, True, bits, read, spacing)


def dequantized_weight(node: ir.Node, transposed: bool) -> Weight | None:
    """The weight behind a DequantizeLinear: per tensor, per row or column, or by blocks."""
    operands = [_constant(node, index) for index in range(min(3, len(node.inputs)))]
    operands += [None] * (3 - len(operands))
    codes, scales, zeros = operands
    if codes is None or scales is None or len(codes.shape) != 2:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    first, second = (int(size) for size in codes.shape)
    whole = (first, second)
    if axis not in (-2, -1, 0, 1) or block < 0:
        return None
    cut = tuple(-(-size // block) if block and at == axis % 2 else size for at, size in enumerate(whole))
    fitting = ((), (1,), (whole[axis % 2],), cut) if block else ((), (1,), (whole[axis % 2],))
    if any(one is not None and tuple(one.shape) not in fitting for one in (scales, zeros)):
        return None  # not what its numbers say

    def spread(array: Array) -> Array:
        if array.ndim == 1 and array.size > 1:
            return array.reshape((-1, 1) if axis % 2 == 0 else (1, -1))
        if block and array.ndim == 2:
            return np.repeat(array, block, axis)[:first, :second]
        return array

    def read(rows: Any) -> Array:
        wide = stored(codes).astype(np.float32)
        if zeros is not None:
            wide = wide - spread(stored(zeros).astype(np.float32))
        wide = wide * spread(stored(scales).astype(np.float32))
        return wide[:, rows].T if transposed else wide[rows]

    outputs, inputs = (second, first) if transposed else (first, second)
    bits = int(codes.dtype.bitwidth)
    return Weight(node.inputs[0], outputs, inputs, transposed, False, bits, read)


def _constant(node: ir.Node, index: int) -> Any:
    value = node.inputs[index]
    return None if value is None else value.const_value
