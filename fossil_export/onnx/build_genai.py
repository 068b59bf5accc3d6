"""A graph by ONNX Runtime GenAI's model builder: a folder that GenAI runs as it is."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fossil_export.errors import MissingExtraError, OnnxError
from fossil_export.onnx.graph_file import load_graph


def build_genai(model: Path, output: Path, precision: str, device: str) -> Path:
    """Build the graph of the checkpoint folder `model` into `output` and return its path.

    The builder runs as a process of its own: it prints, and it loads the whole model. Raises OnnxError with
    its last words when it fails.
    """
    for package in ("onnxruntime_genai", "torch", "transformers", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package.replace("_", "-"), "genai", "the GenAI model builder")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.cache-") as cache:
        provider = "cuda" if device.startswith("cuda") else "cpu"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
        command += ["-p", precision, "-e", provider, "-c", cache]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    from fossil_export.onnx.edit import Editor

    graph = output / "model.onnx"
    if done.returncode or not graph.is_file():
        lines = [line.strip() for line in re.split(r"[\r\n]+", done.stderr or done.stdout) if line.strip()]
        raise OnnxError(
            f"{model}: ONNX Runtime GenAI's builder failed: {lines[-1] if lines else done.returncode}; "
            "use --runtime torch, or bring a graph of your own with --onnx"
        )
    Editor(load_graph(graph)).save(graph)  # it notes shapes of constants that ONNX's checker refuses
    return graph
