"""Who makes a graph of a model: one file each with `build(model, output, precision, device)`, one entry in `BUILDERS`.

The tables are all that the command's help needs; a builder's file is imported when it builds. A graph that the user
has (`existing`) is no entry: nobody makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from fossil_export._extras import Need, need

RuntimeName = Literal["genai", "torch"]
PrecisionName = Literal["fp32", "fp16", "bf16", "int4"]


MAKING = need("genai", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers")
"""What making a graph takes, whoever makes it."""


@dataclass(frozen=True)
class Precision:
    """Of a graph's weights: bytes of each at most, torch's name of the dtype in which the model is loaded and merged
    weights are rounded (once), and whether the graph holds codes for them."""

    nbytes: int
    dtype: str
    codes: bool = False


PRECISIONS = {
    "fp32": Precision(4, "float32"),
    "fp16": Precision(2, "float16"),
    "bf16": Precision(2, "bfloat16"),
    "int4": Precision(1, "float32", codes=True),
}


@dataclass(frozen=True)
class Builder:
    """Who makes graphs; `name` is that of its file (`_name.py`), `help` a word for users.

    The default for a model is the first whose `takes` says yes to its architectures; `models` names these for users,
    empty for all the rest. `needs` are the packages that it takes.
    """

    name: str
    help: str
    models: str
    takes: Callable[[Sequence[str]], bool]
    needs: Need = MAKING

    def build(self, model: Path, output: Path, precision: str, device: str) -> Path:
        """Make the graph of the checkpoint folder `model` in the folder `output` and return its path.

        `device` is "cpu" or "cuda". Raises OnnxError when it cannot be made, MissingExtraError for want of a package.
        """
        found: Path = import_module(f"{__name__}._{self.name}").build(model, output, precision, device)
        return found


def _generative(architectures: Sequence[str]) -> bool:
    return any(name.endswith("ForCausalLM") for name in architectures)


_CACHED = "ONNX Runtime GenAI's builder, with key-value cache"
_GENAI, _TORCH = need("genai", *MAKING.modules, "onnxruntime_genai"), need("genai", *MAKING.modules, "onnxscript")

BUILDERS = {
    builder.name: builder
    for builder in (
        Builder("genai", _CACHED, "generative models", _generative, _GENAI),
        Builder("torch", "PyTorch's exporter", "", lambda architectures: True, _TORCH),
    )
}


def default_builder(architectures: Sequence[str]) -> Builder:
    """Who makes the graph of a model if nobody is named."""
    return next(builder for builder in BUILDERS.values() if builder.takes(architectures))
