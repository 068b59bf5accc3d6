"""A graph's file and the files of data beside it, read without the data."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.errors import OnnxError, unreadable
from fossil_export.onnx.graph._tensors import check_tensors, tensors_of

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
    _quiet()
    try:
        if path.exists() and not path.is_file():  # a pipe would let us wait
            raise OnnxError(f"{path}: is no regular file; put the file itself in its place")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it leaves out, which nobody reads
            model = ir.load(path)
    except OSError as problem:
        raise OnnxError(unreadable(path, problem)) from problem
    except OnnxError:
        raise
    except (ValueError, RuntimeError) as problem:
        raise OnnxError(f"{path}: is no ONNX graph: {str(problem).splitlines()[0]}") from problem
    except Exception as problem:  # protobuf's own errors
        raise OnnxError(f"{path}: is no ONNX graph ({type(problem).__name__}); fetch or export it again") from problem
    check_tensors(model, path)
    for file, needed in external_files(model).items():
        if not file.is_relative_to(path.parent) or ".." in file.relative_to(path.parent).parts:
            raise OnnxError(
                f"{path}: keeps its data outside its folder, in {str(file)[:300]}; move it beside the graph"
            )
        shown = str(file.relative_to(path.parent))[:300]
        try:
            size = file.stat().st_size if file.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            size = None
        if size is None:
            raise OnnxError(f"{path}: its external data {shown} is missing or no file; put it beside the graph")
        if size < needed:
            raise OnnxError(f"{file}: has {size:,} bytes, the graph reads up to {needed:,}; fetch it again")
    _refuse_cycles(model, path)
    return model


def _refuse_cycles(model: ir.Model, path: Path) -> None:
    try:
        model.graph.sort()
    except ValueError as problem:
        raise OnnxError(f"{path}: has nodes that wait for each other; export the graph again") from problem


def _quiet() -> None:
    """Let onnx_ir's log go where the program that uses it has asked for, and not to stderr if it has not."""
    logger = logging.getLogger("onnx_ir")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def external_files(model: ir.Model) -> dict[Path, int]:
    """The external data files of a graph and the bytes of each that it reads."""
    import onnx_ir as ir

    files: dict[Path, int] = {}
    for tensor in tensors_of(model):
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.base_dir) / tensor.location
            end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
            files[path] = max(files.get(path, 0), end)
    return files
