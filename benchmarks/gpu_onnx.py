"""The ONNX part of gpu_parity.py: single layers as graphs, rewritten in each mode, run on the device."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_parity
import numpy as np
import torch
from gpu_parity import Row, Setup, Variant

from fossil_export import FossilExportError, export_onnx

MODES = ("merged", "tiled", "fused", "swappable")
LAYERS = ("q, o", "gate, up")
COLUMNS = ("mode", "layer", "variant", "dtype", "trainer", "graph", "swapped out")


@dataclass(frozen=True)
class OnnxRow(Row):
    """One layer in one mode; `swapped_out` says whether the plain graph's answers came back to the bit (None for
    modes without adapters)."""

    mode: str = ""
    swapped_out: bool | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.swapped_out is False:
            found.append(f"{self.part}, {self.mode}, {self.dtype}: the plain graph's answers do not come back")
        return found


def why_not(device: str) -> str | None:
    """Why the part cannot run here, None when it can."""
    for package in ("onnx", "onnx_ir", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import onnxruntime

    if device.startswith("cuda") and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    return None


def onnx_rows(setup: Setup, dtypes: Sequence[str], work: Path | None) -> list[OnnxRow]:
    """Every variant and mode on two kinds of layer; a dtype that the provider has no kernels for is left out."""
    rows = []
    for dtype in dtypes:
        if dtype == "bfloat16" and not setup.device.startswith("cuda"):
            continue
        for variant in setup.variants:
            for name in LAYERS:
                with tempfile.TemporaryDirectory(prefix="gpu-onnx-", dir=work) as folder:
                    rows += list(_cases(setup, variant, dtype, name, Path(folder)))
                gpu_parity.free()
        gpu_parity.say(f"ONNX graphs, {dtype}: done")
    return rows


def cells(row: OnnxRow) -> list[str]:
    trainer, graph = row.errors[0]
    back = "" if row.swapped_out is None else "equal" if row.swapped_out else "DIFFERENT"
    return [row.mode, *row.head, f"{trainer:.2e}", f"{graph:.2e}", back]


def _cases(setup: Setup, variant: Variant, dtype: str, name: str, folder: Path) -> Iterator[OnnxRow]:
    import copy

    torch.manual_seed(gpu_parity.SEED)
    shape = setup.layers[name]
    layer = gpu_parity.trained_layer(setup, variant, dtype, shape)
    if not bool(torch.isfinite(layer.miss_block["default"]).all()):
        return
    graph = _write(layer, variant, dtype, folder)
    inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(getattr(torch, dtype))
    with torch.no_grad():
        truth = copy.deepcopy(layer).double()(inputs.double())
        trainer = gpu_parity.relative(layer(inputs), truth)
    x = inputs.float().cpu().numpy()
    plain = _run(graph, x, setup.device)
    for mode in MODES:
        if variant.method == "bat" and mode in ("fused", "swappable"):
            continue
        result = export_onnx(folder / "adapter", folder / mode, base=folder / "base", mode=mode, onnx=graph)
        found = torch.from_numpy(_run(result.graph, x, setup.device, result.adapter_file)).to(setup.device)
        # A CPU computes float16 in float32 and rounds where graphs are cut, an If's ends among them.
        exact = mode == "swappable" and (dtype != "float16" or setup.device.startswith("cuda"))
        out = np.array_equal(_run(result.graph, x, setup.device), plain) if exact else None
        part, errors = f"{name} {shape[0]}×{shape[1]}", ((trainer, gpu_parity.relative(found, truth)),)
        yield OnnxRow(part, variant.name, variant.rank, dtype, errors=errors, mode=mode, swapped_out=out)


def _write(layer: Any, variant: Variant, dtype: str, folder: Path) -> Path:
    """Base and adapter folders, and the plain graph: x float32 (positions, in) -> y float32, computed in `dtype`."""
    import onnx
    from onnx import TensorProto, helper
    from safetensors.torch import save_file

    weight = layer.base_layer.weight.detach().cpu().contiguous()
    for name in ("base", "adapter", "plain"):
        (folder / name).mkdir()
    save_file({"layer.weight": weight}, folder / "base" / "model.safetensors")
    shard = layer.miss_block["default"].detach().cpu().contiguous()
    save_file({"base_model.model.layer.miss_block": shard}, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "MISS", "r": variant.rank, "mini_r": variant.mini_r, "init_weights": variant.init}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["layer"]}))
    kind = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[dtype]
    raw = gpu_parity.stored(weight.T.contiguous()).tobytes()
    held = helper.make_tensor("layer.weight", kind, [weight.shape[1], weight.shape[0]], raw, raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], "/Cast", to=kind),
        helper.make_node("MatMul", ["narrow", "layer.weight"], ["product"], "/layer/MatMul"),
        helper.make_node("Cast", ["product"], ["y"], "/Cast_back", to=TensorProto.FLOAT),
    ]
    sizes = (("x", weight.shape[1]), ("y", weight.shape[0]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["positions", size]) for name, size in sizes]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [held])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "plain" / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return folder / "plain" / "model.onnx"


def _run(graph: Path, x: Any, device: str, adapter: Path | None = None) -> Any:
    import onnxruntime as ort

    from fossil_export.verifying.onnx_models import providers

    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 3
    available: list[Any] = providers(device)
    if device.startswith("cuda"):
        available[0] = ("CUDAExecutionProvider", {"use_tf32": "0"})
    session = ort.InferenceSession(str(graph), settings, providers=available)
    if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
        raise FossilExportError("ONNX Runtime could not start its CUDA provider: are CUDA 13 and cuDNN there?")
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return session.run(["y"], {"x": x}, options)[0]
