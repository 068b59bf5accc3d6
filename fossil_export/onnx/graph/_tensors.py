"""Whether the constants of a graph hold what their types and shapes say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.errors import OnnxError

if TYPE_CHECKING:
    import onnx_ir as ir

_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def tensors_of(model: ir.Model) -> Iterator[Any]:
    """Initializers, those of subgraphs too, and what nodes hold as attributes."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type.name == "TENSOR":
                    yield attribute.value
                elif attribute.type.name == "TENSORS":
                    yield from attribute.value


def check_tensors(model: ir.Model, path: Path) -> None:
    """Raise OnnxError for a constant that cannot be read. Its values are not looked at."""
    for tensor in tensors_of(model):
        if why := _wrong(tensor):
            raise OnnxError(f"{path}: the constant {str(tensor.name)[:200]} {why}; export the graph again")


def _wrong(tensor: Any) -> str:
    import onnx_ir as ir

    kind = tensor.dtype.name
    if kind == "UNDEFINED":
        return "has no type"
    sizes = list(tensor.shape)
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        return f"has the shape {str(sizes)[:200]}"
    if kind == "STRING" or not isinstance(tensor, (ir.ExternalTensor, ir.TensorProtoTensor)):
        return ""
    if len(sizes) > 64:
        return f"has {len(sizes)} dimensions"
    count = 1
    for size in sizes:
        count *= size
    nbytes = -(-count * tensor.dtype.bitwidth // 8)
    what = f"{kind} {str(sizes)[:200]}"
    if isinstance(tensor, ir.ExternalTensor):
        if (tensor.offset or 0) < 0 or tensor.length not in (None, nbytes):
            return f"is {what} and names {tensor.length} bytes from byte {tensor.offset} on"
        return ""
    proto = tensor.raw
    if proto.HasField("raw_data"):
        return "" if len(proto.raw_data) == nbytes else f"is {what} and has {len(proto.raw_data):,} bytes"
    held = max(len(getattr(proto, field)) for field in _FIELDS)
    packed = nbytes if tensor.dtype.bitwidth < 8 else count * (2 if kind.startswith("COMPLEX") else 1)
    return "" if held == packed else f"is {what} and has {held:,} values"
