"""The places of a graph where a linear layer is computed: products with a constant matrix."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.onnx.graph._weight import FLOAT_NAMES, Weight, block_weight, dequantized_weight, float_weight

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which `torch.onnx.export(dynamo=True)` keeps the module path of a node."""


@dataclass(frozen=True, eq=False)
class Site:
    """One product `y = x Wᵀ`: a MatMul, Gemm or MatMulNBits node and its constant weight.

    `scopes` are the modules the exporter says the node comes from, outermost first; `paths` are module-like
    names read out of the node's and the weight's names.
    """

    node: ir.Node
    weight: Weight
    scopes: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """What a reader of the graph knows it by."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def inputs_first(self) -> bool:
        """Whether the product reads its operand as (in, out)."""
        return self.node.op_type == "MatMul" or not _number(self.node, "transB", 0)

    @property
    def activation(self) -> str:
        """ONNX's name of the dtype of x and y."""
        for value in (self.x, self.y):
            if value is not None and value.dtype is not None:
                return str(value.dtype.name)
        if self.weight.bits is None:
            return self.weight.dtype
        return str(self.node.inputs[2].dtype.name)  # the scales'

    @property
    def x(self) -> ir.Value:
        return self.node.inputs[0]

    @property
    def y(self) -> ir.Value:
        return self.node.outputs[0]


def find_sites(graph: ir.Graph) -> tuple[Site, ...]:
    """All products with a constant matrix in the main graph, in the order they run."""
    return tuple(
        Site(node, weight, _scopes(node), tuple(_paths(node, weight)))
        for node in graph
        if (weight := _weight_of(node)) is not None
    )


def _weight_of(node: ir.Node) -> Weight | None:
    if len(node.outputs) != 1:
        return None
    try:
        return _read_weight(node)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None  # attributes and inputs of other types or numbers than the operator has


def _read_weight(node: ir.Node) -> Weight | None:
    key = (node.domain, node.op_type)
    if key == ("com.microsoft", "MatMulNBits"):
        return block_weight(node)
    if key == ("", "MatMul") and len(node.inputs) == 2:
        return _trace(node.inputs[1], True)
    if key == ("", "Gemm"):
        plain = all(_number(node, name, default) == default for name, default in (("alpha", 1.0), ("transA", 0)))
        return _trace(node.inputs[1], not _number(node, "transB", 0)) if plain else None
    return None


def _trace(value: ir.Value | None, transposed: bool, direct: bool = True) -> Weight | None:
    """Follow a product's second operand through casts, transposes and dequantization to its initializer."""
    if value is None:
        return None
    if value.const_value is not None:
        return float_weight(value, transposed, direct)
    node = value.producer()
    if node is None or node.domain not in ("", "com.microsoft"):
        return None
    is_cast = node.op_type == "Cast" and _type_name(node.attributes["to"].as_int()) in FLOAT_NAMES
    if node.op_type == "Identity" or is_cast:
        return _trace(node.inputs[0], transposed, False)
    if node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else [1, 0]
        return _trace(node.inputs[0], not transposed, False) if list(order) == [1, 0] else None
    if node.op_type == "DequantizeLinear":
        return dequantized_weight(node, transposed)
    return None


def _type_name(code: int) -> str:
    import onnx_ir as ir

    return str(ir.DataType(code).name)


def _number(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _scopes(node: ir.Node) -> tuple[str, ...]:
    try:
        found = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ()
    return tuple(str(scope) for scope in found if scope) if isinstance(found, list) else ()


_OPERATION = re.compile(r"^(matmul|gemm|linear|matmulnbits)([_.]?\d*)?(_q\d+)?(_quant\w*)?$", re.IGNORECASE)
_STORED = re.compile(
    r"([._](weight|qweight|kernel))?([._](q\d|quantized|quant|scales?|transposed?|fp16|merged_\d+_?))*$", re.IGNORECASE
)


def _paths(node: ir.Node, weight: Weight) -> Iterator[str]:
    for name in (node.name, weight.value.name):
        if not name:
            continue
        parts = [part for part in re.split(r"[/.]", _STORED.sub("", name)) if part]
        while parts and _OPERATION.match(parts[-1]):
            parts.pop()
        if parts and any(not part.startswith("onnx::") for part in parts):
            yield ".".join(parts)
