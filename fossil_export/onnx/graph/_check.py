"""ONNX's own checker, with full shape inference, over a rewritten graph."""

from __future__ import annotations

from pathlib import Path

from fossil_export._extras import required
from fossil_export.errors import OnnxError
from fossil_export.onnx.graph._file import external_files, load_graph
from fossil_export.writing._scratch import scratch_folder

_RUNTIME = "com.microsoft"


def check(graph: Path) -> None:
    """Raise OnnxError, with the checker's first line, unless `graph` is a valid model.

    The checker sees a copy with two differences. Data files are stood in for by empty ones, since it refuses hard
    links. Operators that ONNX Runtime registers under ONNX's name without a schema there (GenAI's builder uses
    SimplifiedLayerNormalization so) are put into the runtime's domain, of which the checker knows nothing.
    """
    onnx = required("onnx")
    files = external_files(load_graph(graph))
    model = onnx.load(graph, load_external_data=False)
    foreign = [node for node in model.graph.node if not node.domain and not onnx.defs.has(node.op_type)]
    for node in foreign:
        node.domain = _RUNTIME
    if foreign and all(entry.domain != _RUNTIME for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_RUNTIME, 1))
    with scratch_folder(graph.parent) as folder:
        for file, size in files.items():
            stand_in = folder / file.relative_to(graph.parent)
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            with stand_in.open("wb") as empty:
                empty.truncate(size)
        copy = folder / graph.name
        copy.write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(str(copy), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as problem:
            line = next(iter(str(problem).splitlines()), "")
            raise OnnxError(f"the graph does not pass ONNX's checker: {line}; use another --mode or graph") from problem
