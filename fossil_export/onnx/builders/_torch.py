"""A graph by `torch.onnx.export(dynamo=True)`: encoders, classifiers, whatever transformers loads."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fossil_export._extras import required
from fossil_export._foreign import load_model, model_class, read_config
from fossil_export.errors import FossilExportError, OnnxError
from fossil_export.onnx.builders import PRECISIONS
from fossil_export.onnx.graph._file import forget_sources

OPSET = 20
BLOCK = 32
"""Values that share a scale in int4, as in GenAI's builder."""


def build(model: Path, output: Path, precision: str, device: str) -> Path:
    """Export the checkpoint folder `model` into `output` and return the graph's path.

    A language model gets no key-value cache: the graph maps whole sequences to logits. Batch and sequence
    (image size, for vision models, is fixed by the config) stay dynamic; the graph is the same for every `device`.
    Raises OnnxError when the exporter fails.
    """
    torch = required("torch", "genai", "exporting with PyTorch")
    output.mkdir(parents=True, exist_ok=True)
    graph = output / "model.onnx"
    network, arguments, axes = _model_and_inputs(model, precision)
    try:
        with _quiet(), torch.no_grad():
            names = [name for name, value in network(**arguments).items() if isinstance(value, torch.Tensor)]
            program = torch.onnx.export(
                network,
                (),
                kwargs=arguments,
                dynamo=True,
                dynamic_shapes=axes,
                input_names=list(arguments),
                output_names=names,
                opset_version=OPSET,
                verbose=False,
            )
            forget_sources(program.model)
            program.save(str(graph), external_data=True)
    except FossilExportError:
        raise
    except Exception as problem:  # whatever tracing a model's own code raises
        line = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        newer = "pip install -U onnxscript onnx-ir, or " if "onnxscript" in line or "onnx_ir" in line else ""
        raise OnnxError(
            f"{model}: PyTorch's exporter failed: {line}; {newer}bring a graph of your own with --onnx"
        ) from problem
    if PRECISIONS[precision].codes:
        _quantize(graph)
    return graph


def _model_and_inputs(folder: Path, precision: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    import torch

    with _quiet():
        config = read_config(folder)
        kind = model_class(config, "AutoModel")
        network = load_model(
            kind, folder, config, dtype=getattr(torch, PRECISIONS[precision].dtype), attn_implementation="eager"
        )
    network = network.eval()
    network.config.use_cache = False
    accepted = inspect.signature(network.forward).parameters
    arguments: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    if network.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        arguments["pixel_values"] = torch.zeros(2, channels, height, width, dtype=network.dtype)
        axes["pixel_values"] = {0: "batch"}
    elif network.main_input_name == "input_ids":
        texts = ["input_ids", "attention_mask"]
        if config.is_encoder_decoder:
            texts += ["decoder_input_ids"]
        for text in texts:
            if text in accepted:
                arguments[text] = torch.ones(2, 6 if text.startswith("decoder") else 8, dtype=torch.int64)
                axes[text] = {0: "batch", 1: "decoder_sequence" if text.startswith("decoder") else "sequence"}
    else:
        raise OnnxError(
            f"{folder}: {kind.__name__} takes {network.main_input_name}, for which no inputs can be made up; "
            "export it yourself and bring the graph with --onnx"
        )
    return network, arguments, axes


def _quantize(graph: Path) -> None:
    """Every MatMul to 4-bit MatMulNBits, by ONNX Runtime's own quantizer."""
    onnx = required("onnx")
    module = required("onnxruntime.quantization.matmul_nbits_quantizer")
    with _quiet():
        quantizer = module.MatMulNBitsQuantizer(str(graph), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantized = quantizer.model.model
    data = graph.with_name(graph.name + ".data")
    data.unlink(missing_ok=True)
    onnx.save(quantized, str(graph), save_as_external_data=True, location=data.name, size_threshold=1024)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantizer print and warn; what matters comes as exceptions."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
