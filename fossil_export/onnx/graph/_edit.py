"""Small operations on a graph: add constants and nodes with names, put a node's result in another's place, save."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fossil_export.onnx.graph._file import forget_sources
from fossil_export.onnx.graph._weight import unguarded

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

ADDED = "fossil_shards.onnx.data"
"""External data file of the constants that were added to a graph. The base's own data file is left as it is."""


class Editor:
    """Changes one graph in place. New constants are collected and written to a file of their own by `save`."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self._large: list[ir.Value] = []
        self._small: dict[tuple[Any, ...], ir.Value] = {}
        self._shapes: dict[tuple[Any, ...], ir.Value] = {}
        self._names: dict[str, int] = {}
        self.replaced: dict[int, ir.Value] = {}
        """What took the place of a value, by the value's id."""

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A one-dimensional constant of int64, made once for each value."""
        key = tuple(values)
        if key not in self._small:
            name = "fossil/constants/" + "_".join(map(str, key))
            self._small[key] = self._register(name, ir.tensor(np.array(values, np.int64), name=name))
        return self._small[key]

    def tiling(self, inputs: int, rank: int) -> ir.Value:
        """T (in, r) in float32, 1 where j mod r == k; made once for each size."""
        name = f"fossil/constants/tiling_{inputs}_{rank}"
        if name not in self.graph.initializers:
            columns = np.arange(inputs) % rank
            self.constant(name, (columns[:, None] == np.arange(rank)).astype(np.float32))
        return self.graph.initializers[name]

    def constant(self, name: str, values: Array) -> ir.Value:
        """An initializer whose data goes to the file of what was added."""
        value = self._register(name, ir.tensor(np.ascontiguousarray(values), name=name))
        self._large.append(value)
        return value

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """An initializer of the tensor as it is (external data stays where it lies)."""
        return self._register(name, tensor)

    def lazy(self, name: str, tensor: ir.LazyTensor) -> ir.Value:
        """An initializer that is computed when it is written."""
        return self._register(name, tensor)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        into: list[ir.Node] | None = None,
        shape: Iterable[Any] | None = None,
        dtype: Any = None,
        **attributes: Any,
    ) -> ir.Value:
        """Insert a node of ONNX's own domain and return its output; `dtype` defaults to the first input's.

        Nodes of a branch are collected `into` a list. A name that is taken already (a weight read by several
        nodes) gets a number.
        """
        self._names[name] = self._names.get(name, 0) + 1
        if self._names[name] > 1:
            name = f"{name}_{self._names[name]}"
        dtype = dtype or inputs[0].dtype
        output = ir.Value(
            name=f"{name}/output_0",
            shape=None if shape is None else ir.Shape(shape),
            type=None if dtype is None else ir.TensorType(dtype),
        )
        node = ir.node(op_type, inputs, attributes, outputs=[output], name=name)
        if into is not None:
            into.append(node)
        elif after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.insert_before(before, node)
        return output

    def flat(self, value: ir.Value, name: str, width: int, **where: Any) -> ir.Value:
        """`value` as a matrix (positions, width); itself if it is one. `where` is for `node`."""
        if value.shape is not None and len(value.shape) == 2:
            return value
        return self.node("Reshape", [value, self.integers([-1, width])], name, shape=[None, width], **where)

    def cast(self, value: ir.Value, dtype: Any, name: str, **where: Any) -> ir.Value:
        """`value` in `dtype`; itself if it is. `where` is for `node`."""
        if value.dtype == dtype:
            return value
        return self.node("Cast", [value], name, shape=value.shape, dtype=dtype, to=int(dtype), **where)

    def padded(self, value: ir.Value, pads: ir.Value, name: str, shape: Iterable[Any], **where: Any) -> ir.Value:
        """`value` with zeros around it, in float32 if it is bfloat16, which no provider of ONNX Runtime pads."""
        if value.dtype == ir.DataType.BFLOAT16:
            value = self.cast(value, ir.DataType.FLOAT, f"{name}/Cast", **where)
        return self.node("Pad", [value, pads], name, shape=shape, **where)

    def with_last(self, x: ir.Value, width: int, before: ir.Node) -> ir.Value:
        """The shape of `x` with its last dimension made `width`; made once for all values of the same dimensions."""
        dims = None if x.shape is None else tuple(str(dim) for dim in list(x.shape)[:-1])
        known = dims is not None and not any(dim in ("None", "?", "") for dim in dims)
        lead = ("lead", dims if known else id(x))
        if lead not in self._shapes:
            name = "fossil/leading_dimensions" if known else f"{x.name}/fossil/leading_dimensions"
            if self.graph.opset_imports.get("", 0) >= 15:
                made = self.node("Shape", [x], name, before=before, dtype=ir.DataType.INT64, start=0, end=-1)
            else:
                whole = self.node("Shape", [x], f"{name}/whole", before=before, dtype=ir.DataType.INT64)
                cut = [self.integers([0]), self.integers([-1])]
                made = self.node("Slice", [whole, *cut], name, before=before, dtype=ir.DataType.INT64)
            self._shapes[lead] = made
        key = (*lead, width)
        if key not in self._shapes:
            name = f"{self._shapes[lead].producer().name}/with_{width}"
            parts = [self._shapes[lead], self.integers([width])]
            self._shapes[key] = self.node("Concat", parts, name, before=before, axis=0)
        return self._shapes[key]

    def choose(
        self,
        condition: ir.Value,
        taken: tuple[list[ir.Node], list[ir.Value]],
        passed: tuple[list[ir.Node], list[ir.Value]],
        name: str,
        after: ir.Node,
    ) -> list[ir.Value]:
        """Insert an If over two lists of nodes with their results, and return what it gives."""
        branches = {
            key: ir.Graph([], results, nodes=nodes, name=f"{name}/{key}")
            for key, (nodes, results) in (("then_branch", taken), ("else_branch", passed))
        }
        outputs = [
            ir.Value(name=f"{name}/output_{index}", shape=value.shape, type=value.type)
            for index, value in enumerate(passed[1])
        ]
        node = ir.node("If", [condition], branches, outputs=outputs, name=name)
        self.graph.insert_after(after, node)
        return outputs

    def replace(self, old: ir.Value, new: ir.Value, keep: Sequence[ir.Node]) -> None:
        """All readers of `old` but the nodes `keep` read `new`; an output of the graph keeps its name."""
        self.replaced[id(old)] = new
        kept = {id(node) for node in keep}
        for usage in tuple(old.uses()):
            if id(usage.node) not in kept:
                usage.node.replace_input_with(usage.idx, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new
                name, old.name = old.name, f"{old.name}/base"
                new.name, new.shape, new.type = name, old.shape, old.type

    def save(self, path: Path, repack: bool = False) -> None:
        """Write the graph to `path` and the new constants beside it; unused initializers are dropped.

        `repack` writes all large tensors, the base's too, to one new data file instead.
        """
        self.graph.sort()
        forget_sources(self.model)
        for value in [*self.graph.initializers.values()]:
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self.graph.initializers[value.name]
        for node in self.graph:
            if node.op_type == "Constant" and not node.domain and "value" in node.attributes:
                node.outputs[0].shape = node.attributes["value"].as_tensor().shape  # GenAI's builder notes others
        if repack:
            for value in self.graph.initializers.values():
                value.const_value = _told(unguarded(value.const_value))
            # Beside what it is made from: onnx_ir before 1.1 writes to the very file, which would be read meanwhile.
            data = path.with_name(f"{path.name}.data")
            with tempfile.TemporaryDirectory(dir=path.parent) as place:
                new = Path(place, path.name)
                _save(self.model, new, external_data=data.name, size_threshold_bytes=1024)
                if (made := new.with_name(data.name)).exists():
                    made.replace(data)
                new.replace(path)
            return
        large = [value for value in self._large if value.name in self.graph.initializers]
        if large:
            tensors = ir.external_data.convert_tensors_to_external(
                [_told(value.const_value) for value in large], path.parent, ADDED
            )
            for value, tensor in zip(large, tensors, strict=True):
                value.const_value = tensor
        _save(self.model, path)

    def _register(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


class _Told(ir.LazyTensor):  # type: ignore[misc]
    """A tensor that goes into a file with every failure told: NumPy's `tofile` passes over a disk that is full."""

    def tofile(self, file: Any) -> None:
        file.write(self.tobytes())


def _told(tensor: Any) -> Any:
    """`tensor`, unless it is small, or external, which is written with every failure told already."""
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < 1024:
        return tensor
    return _Told(lambda: tensor, tensor.dtype, shape=tensor.shape, name=tensor.name)


def _save(model: ir.Model, path: Path, **options: Any) -> None:
    """Save as onnx_ir does, which wraps what the system says into errors of its own. Raises OSError."""
    try:
        ir.save(model, path, **options)
    except Exception as problem:
        cause: BaseException | None = problem
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from problem
            cause = cause.__cause__ or cause.__context__
        raise
