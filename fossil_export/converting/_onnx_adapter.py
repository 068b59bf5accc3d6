"""To ONNX Runtime's adapter file, for a swappable graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.converting._options import Options
from fossil_export.errors import OnnxError


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Write what `adapter` trained under the names of the graph's inputs. Raises OnnxError and OSError."""
    from fossil_export._extras import need, require
    from fossil_export.merging._planning import plan_merge, settled
    from fossil_export.onnx._adapter_file import adapter_arrays, check_base, write_adapter
    from fossil_export.onnx._refusals import check_mode
    from fossil_export.onnx._signature import read_signature
    from fossil_export.onnx.builders._existing import find_graph

    if options.graph is None:
        raise OnnxError("an adapter file is made for a graph; name the folder of a swappable export with --for")
    require("working on ONNX graphs", need("onnx"))
    check_mode(adapter, "swappable")
    graph = find_graph(options.graph)
    signature = read_signature(graph)
    arrays = adapter_arrays(adapter, signature, graph)
    check_base(settled(plan_merge(adapter, options.base, into="original")), signature, graph)
    write_adapter(output, arrays, signature)
    return {"graph": str(graph), "tensors": len(arrays), "inputs": len(signature.inputs)}
