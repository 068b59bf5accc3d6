"""Single layers as ONNX graphs, rewritten in each mode and run on the device."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from fossil_export import export_onnx
from fossil_export.onnx.modes import ModeName
from gpu.cases import Case, OnnxRow, Setup, Variant, blank
from gpu.layers import adapter_of, trained_layer
from gpu.tools import Array, Scratch, free, line_of, relative, stored

KINDS = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
ADAPTER = "adapter_model.safetensors"
FOLDERS = ("base", "plain", "adapter", "exported")


class Graphs:
    """Makes the rows of graphs. The layer and the plain graph are made once for all modes, and an exported graph
    does not outlive its row."""

    def __init__(self, setup: Setup, scratch: Scratch) -> None:
        self._setup, self._scratch = setup, scratch
        self._written: tuple[str, str] | None = None
        self._trained: Case | None = None

    def row(self, case: Case) -> OnnxRow:
        """Export one layer in one mode and run it."""
        setup, scratch = self._setup, self._scratch
        row = blank(setup, case)
        assert isinstance(row, OnnxRow)
        if self._trained != replace(case, mode=""):
            self._prepare(case)
        if self._diverged:
            return replace(row, diverged=True)
        folder, graph = scratch.folder, scratch.folder / "plain" / "model.onnx"
        scratch.drop("exported")
        mode = cast(ModeName, case.mode)
        result = export_onnx(folder / "adapter", folder / "exported", base=folder / "base", mode=mode, onnx=graph)
        scratch.note()
        found = torch.from_numpy(answers(result.graph, self._x, setup.device, result.adapter_file)).to(setup.device)
        # A CPU computes float16 in float32 and rounds where graphs are cut, an If's ends among them.
        exact = case.mode == "swappable" and (case.dtype != "float16" or setup.device.startswith("cuda"))
        out = np.array_equal(answers(result.graph, self._x, setup.device), self._plain) if exact else None
        scratch.drop("exported")
        return replace(row, errors=((self._trainer, relative(found, self._truth)),), swapped_out=out)

    def close(self) -> None:
        self._written = self._trained = None
        self._scratch.drop(*FOLDERS)
        free()

    def _prepare(self, case: Case) -> None:
        """Train the layer, write what an export starts from, and compute what it is held against."""
        setup, variant = self._setup, self._setup.variants[case.variant]
        self._trained = None
        free()
        shape = setup.model.layers[case.layer]
        layer = trained_layer(setup, variant, case.dtype, shape)
        self._diverged = not all(bool(torch.isfinite(tensor).all()) for tensor in adapter_of(layer).values())
        if not self._diverged:
            if self._written != (case.dtype, case.layer):
                self._written = None
                self._write_plain(layer.base_layer.weight.detach().cpu().contiguous(), case.dtype)
                self._written = (case.dtype, case.layer)
            self._write_adapter(layer, variant)
            self._scratch.note()
            inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(getattr(torch, case.dtype))
            with torch.no_grad():
                self._truth = copy.deepcopy(layer).double()(inputs.double())
                self._trainer = relative(layer(inputs), self._truth)
            self._x = inputs.float().cpu().numpy()
            self._plain = answers(self._scratch.folder / "plain" / "model.onnx", self._x, setup.device)
        self._trained = replace(case, mode="")

    def _write_plain(self, weight: Any, dtype: str) -> None:
        """The base's folder and the plain graph."""
        save_file({"layer.weight": weight}, self._scratch.empty("base") / "model.safetensors")
        path = self._scratch.empty("plain") / "model.onnx"
        onnx.save(plain_graph(weight, dtype), path, save_as_external_data=True, location="model.onnx.data")

    def _write_adapter(self, layer: Any, variant: Variant) -> None:
        folder = self._scratch.empty("adapter")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_of(layer).items()}
        save_file({f"base_model.model.layer.{name}": tensor for name, tensor in tensors.items()}, folder / ADAPTER)
        variant.config(target_modules=["layer"]).save_pretrained(folder)


def plain_graph(weight: Any, dtype: str) -> Any:
    """One layer as a graph: x float32 (positions, in) -> y float32, computed in `dtype`."""
    raw = stored(weight.T.contiguous()).tobytes()
    held = helper.make_tensor("layer.weight", KINDS[dtype], [weight.shape[1], weight.shape[0]], raw, raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], "/Cast", to=KINDS[dtype]),
        helper.make_node("MatMul", ["narrow", "layer.weight"], ["product"], "/layer/MatMul"),
        helper.make_node("Cast", ["product"], ["y"], "/Cast_back", to=TensorProto.FLOAT),
    ]
    sizes = (("x", weight.shape[1]), ("y", weight.shape[0]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["positions", size]) for name, size in sizes]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [held])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def why_not(device: str, dtype: str) -> str | None:
    """Why a graph of `dtype` does not run on the device's provider, found by running one; None when it does."""
    weight = torch.eye(4, dtype=getattr(torch, dtype))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    try:
        found = answers(plain_graph(weight, dtype).SerializeToString(), x, device)
    except Exception as problem:  # ONNX Runtime's own classes
        return line_of(problem)
    return None if np.array_equal(found, x) else "it computes wrong products"


def answers(graph: Path | bytes, x: Array, device: str, adapter: Path | None = None) -> Any:
    """What the graph makes of `x` on the device."""
    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 3
    wanted: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        index = device.partition(":")[2] or "0"
        wanted.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0", "device_id": index}))
    source = graph if isinstance(graph, bytes) else str(graph)
    session = ort.InferenceSession(source, settings, providers=wanted)
    if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("its CUDA provider does not start (it needs the CUDA version it was built for, and cuDNN)")
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return session.run(["y"], {"x": x}, options)[0]
