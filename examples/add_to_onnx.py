"""Add FOSSIL to an ONNX file that is there already, and ask the file before and after.

    python examples/add_to_onnx.py                     # tiled, fused and swappable
    python examples/add_to_onnx.py --mode swappable

The file stands for one from elsewhere: its names say nothing and its metadata is gone, so every weight is found by
its values. The model (SmolLM2-135M), its graph (540 MB) and the adapter are made once and cached (see smollm2.py).
The command that does what `export_onnx` does here:

    fossil-export onnx ADAPTER --onnx FILE.onnx --mode tiled --output DIR
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import onnx
import onnxruntime as ort
import smollm2
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fossil_export import export_onnx
from fossil_export.onnx.modes import ModeName

MODES: tuple[ModeName, ...] = ("tiled", "fused", "swappable")
TOKENS = 10


@dataclass(frozen=True)
class Answer:
    """A greedy continuation of the prompt, and the largest difference of its logits to those of PEFT's model."""

    text: str
    difference: float


def nameless_graph() -> Path:
    """The base model as an ONNX file whose names say nothing, from the cache."""
    return smollm2.once("graph-without-names", make_graph) / "base.onnx"


def make_graph(folder: Path) -> None:
    """Export the base model with PyTorch and forget its names."""
    network = AutoModelForCausalLM.from_pretrained(smollm2.base_model(), dtype=torch.float32, use_cache=False).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            kwargs={"input_ids": torch.ones(2, 8, dtype=torch.int64)},
            dynamo=True,
            dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
            input_names=["input_ids"],
            output_names=["logits"],
            verbose=False,
        )
    model = program.model_proto
    forget_names(model)
    onnx.save(model, folder / "base.onnx", save_as_external_data=True, location="base.onnx.data")


def forget_names(model: Any) -> None:
    """Give every node and value but the inputs and outputs a number for a name, and drop what an exporter noted."""
    graph = model.graph
    new = {value.name: value.name for value in (*graph.input, *graph.output)}
    for value in graph.initializer:
        value.name = new.setdefault(value.name, f"w{len(new)}")
        del value.metadata_props[:]
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
        node.ClearField("doc_string")
        node.input[:] = [name and new.setdefault(name, f"v{len(new)}") for name in node.input]
        node.output[:] = [name and new.setdefault(name, f"v{len(new)}") for name in node.output]
        del node.metadata_props[:]
    for value in graph.value_info:
        value.name = new[value.name]
        del value.metadata_props[:]
    del graph.metadata_props[:], model.metadata_props[:]


def answer(graph: Path, prompt: Any, adapter: Path | None = None) -> tuple[list[int], Any]:
    """The tokens a graph continues `prompt` with, greedily, and its logits of the prompt."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # ONNX Runtime warns of each optional input
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    run = ort.RunOptions()
    run.log_severity_level = 3
    if adapter is not None:
        shards = ort.LoraAdapter()
        shards.Load(str(adapter))
        run.add_active_adapter(shards)
    tokens, first = prompt, None
    for _ in range(TOKENS):
        logits = session.run(["logits"], {"input_ids": tokens}, run)[0]
        first = logits if first is None else first
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, prompt.shape[1] :].tolist(), first


def trained_logits(prompt: Any) -> Any:
    """What the trained model says to the prompt, in PEFT."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.base_model(), dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, smollm2.adapter()).eval()(torch.from_numpy(prompt)).logits.numpy()


def main(arguments: Sequence[str] = ()) -> dict[str, Answer]:
    """Ask the graph, add FOSSIL in each mode and ask again; returns the answers by name."""
    parser = argparse.ArgumentParser(description="Add FOSSIL to an ONNX file that is there already.")
    parser.add_argument("--mode", choices=MODES, action="append", help="[default: all three]")
    modes: Sequence[ModeName] = parser.parse_args(arguments).mode or MODES
    logging.captureWarnings(True)
    print("1. an ONNX file of the base whose names say nothing (made once)", flush=True)
    graph = nameless_graph()
    products = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == "MatMul"]
    print(f"   {graph}: {len(products)} products, such as {products[0].name}({', '.join(products[0].input)})")
    tokenizer = AutoTokenizer.from_pretrained(smollm2.base_model())
    prompt = tokenizer(smollm2.PROMPT, return_tensors="np")["input_ids"]
    truth = trained_logits(prompt)
    answers = {}

    def ask(name: str, graph: Path, adapter: Path | None = None) -> None:
        tokens, logits = answer(graph, prompt, adapter)
        answers[name] = Answer(tokenizer.decode(tokens).strip(), float(np.abs(logits - truth).max()))
        print(f"   {name:17} {answers[name].difference:8.5f}  …{answers[name].text}", flush=True)

    print(f'2. "{smollm2.PROMPT} …", and the largest difference to the logits of PEFT\'s trained model')
    ask("before", graph)
    with tempfile.TemporaryDirectory(dir=smollm2.cache()) as temporary:  # beside the graph, to share its data file
        for mode in modes:
            made = export_onnx(smollm2.adapter(), Path(temporary) / mode, mode=mode, onnx=graph)
            ask(mode, made.graph, made.adapter_file)
            if made.adapter_file:
                ask("swappable, none", made.graph)
    return answers


if __name__ == "__main__":
    main(sys.argv[1:])
