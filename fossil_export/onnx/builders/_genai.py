"""A graph by ONNX Runtime GenAI's model builder: a folder that GenAI runs as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fossil_export._foreign import is_trusted, needs_code, refuse_adapter, refuse_newer
from fossil_export._isolation import child_environment, child_flags
from fossil_export.errors import OnnxError
from fossil_export.onnx.builders import _run_genai as run_genai
from fossil_export.onnx.graph._file import load_graph
from fossil_export.writing._scratch import scratch_folder

FLOOR = (0, 14)
"""The first version of GenAI that reads `rope_theta` where transformers 5 has it."""


def build(model: Path, output: Path, precision: str, device: str) -> Path:
    """Build the graph of the checkpoint folder `model` into `output` and return its path.

    The builder runs as a process of its own: it prints, and it loads the whole model. It sees neither the current
    folder as code nor, unless it is trusted, code in the model's folder. Raises OnnxError with its last words when it
    fails.
    """
    refuse_adapter(model)
    refuse_newer(model)
    _check_version()
    output.mkdir(parents=True, exist_ok=True)
    # Inside of the output, which goes with a process that is killed.
    with scratch_folder(output) as cache, _lifeline() as lifeline:
        provider = "cuda" if device.startswith("cuda") else "cpu"
        command = [sys.executable, *child_flags(), str(Path(run_genai.__file__).resolve()), str(lifeline)]
        command += ["-i", str(model.absolute()), "-o", str(output.absolute()), "-p", precision, "-e", provider]
        trust = str(is_trusted()).lower()
        command += ["-c", str(cache), "--extra_options", f"hf_remote={trust}"]  # true by default before GenAI 0.15
        # The builder asks Git for the commit of the repository around Python's packages, which is not its own.
        settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GIT_DIR": os.devnull, "TMPDIR": str(cache)}
        done = subprocess.run(
            command,
            env=child_environment(os.environ) | settings,
            pass_fds=(lifeline,),
            stdin=subprocess.DEVNULL,  # transformers would ask whether to run a model's code
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    from fossil_export.onnx.graph._edit import Editor

    graph = output / "model.onnx"
    if done.returncode or not graph.is_file():
        lines = [line.strip() for line in re.split(r"[\r\n]+", done.stderr or done.stdout) if line.strip()]
        if lines and "trust_remote_code" in lines[-1]:
            raise OnnxError(needs_code(model))
        raise OnnxError(
            f"{model}: ONNX Runtime GenAI's builder failed: {lines[-1] if lines else done.returncode}; "
            "use --runtime torch, or bring a graph of your own with --onnx"
        )
    Editor(load_graph(graph)).save(graph)  # it notes shapes of constants that ONNX's checker refuses
    return graph


def _check_version() -> None:
    """Raise OnnxError for a builder that reads configs of transformers 5 wrongly."""
    for package in ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnxruntime-genai-directml"):
        with suppress(PackageNotFoundError):
            found = version(package)
            parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
            if parts < FLOOR:
                raise OnnxError(
                    f"{package} {found} builds wrong graphs from configs of transformers 5, without a word: "
                    f"pip install '{package}>={'.'.join(map(str, FLOOR))}'"
                )


@contextmanager
def _lifeline() -> Iterator[int]:
    """A descriptor that a child reads from, to end when this process does, even by SIGKILL."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)
