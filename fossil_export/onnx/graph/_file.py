"""A graph's file and the files of data beside it, read without the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.errors import OnnxError, unreadable

if TYPE_CHECKING:
    import onnx_ir as ir

MARK = "fossil_export"
"""Metadata key of a graph that carries an adapter, or can."""


def forget_sources(model: ir.Model) -> None:
    """Drop the stack traces that PyTorch's exporter notes at every node: paths of the machine it ran on."""
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def load_graph(path: Path) -> ir.Model:
    """Read a graph without its external data, whose place and presence are checked. Raises OnnxError.

    A graph that names data outside its folder is refused: files of those names are written where an output goes.
    """
    from fossil_export._extras import required

    ir = required("onnx_ir")
    try:
        model = ir.load(path)
    except OSError as problem:
        raise OnnxError(unreadable(path, problem)) from problem
    except (ValueError, RuntimeError) as problem:
        raise OnnxError(f"{path}: is no ONNX graph: {str(problem).splitlines()[0]}") from problem
    except Exception as problem:  # protobuf's own errors
        raise OnnxError(f"{path}: is no ONNX graph ({type(problem).__name__}); fetch or export it again") from problem
    for file, needed in external_files(model).items():
        if not file.is_relative_to(path.parent) or ".." in file.relative_to(path.parent).parts:
            raise OnnxError(f"{path}: keeps its data outside its folder, in {file}; move it beside the graph")
        if not file.is_file():
            raise OnnxError(f"{path}: its external data {file.name} is missing; put it beside the graph")
        if file.stat().st_size < needed:
            raise OnnxError(
                f"{file}: has {file.stat().st_size:,} bytes, the graph reads up to {needed:,}; fetch it again"
            )
    return model


def external_files(model: ir.Model) -> dict[Path, int]:
    """The external data files of a graph and the bytes of each that it reads."""
    import onnx_ir as ir

    files: dict[Path, int] = {}
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    for value in initializers:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.base_dir) / tensor.location
            end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
            files[path] = max(files.get(path, 0), end)
    return files
