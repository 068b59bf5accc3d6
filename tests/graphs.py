"""Small models of linear layers, their FOSSIL adapters by PEFT, and ONNX graphs of them in every form we know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from peft import MissConfig, get_peft_model
from safetensors.torch import save_file

Array = np.ndarray[Any, Any]

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Layers(torch.nn.Module):
    """Layers of one input, as attention has them: outputs beside each other."""

    def __init__(self, inputs: int, outputs: dict[str, int], bias: bool) -> None:
        super().__init__()
        for name, width in outputs.items():
            setattr(self, name, torch.nn.Linear(inputs, width, bias=bias))
        self.names = list(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.names], -1)


class Stack(torch.nn.Module):
    def __init__(self, inputs: int, outputs: dict[str, int], depth: int, bias: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layers(inputs, outputs, bias) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers])


@dataclass
class Case:
    """A base folder, an adapter folder and PEFT's unmerged model of both."""

    base: Path
    adapter: Path
    trained: Any
    plain: Stack


def make_case(
    folder: Path,
    inputs: int = 24,
    outputs: dict[str, int] | None = None,
    rank: int = 4,
    variant: str = "tile",
    mini_r: int = 1,
    bias: bool = False,
    depth: int = 2,
    targets: list[str] | None = None,
    seed: int = 0,
    adapter: str = "adapter",
) -> Case:
    """Random weights in a safetensors folder, and an adapter that PEFT made for them, every shard moved."""
    outputs = outputs or {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    torch.manual_seed(0)
    plain = Stack(inputs, outputs, depth, bias).eval()
    base = folder / "base"
    base.mkdir(exist_ok=True)
    save_file({name: value.clone() for name, value in plain.state_dict().items()}, base / "model.safetensors")
    copy = Stack(inputs, outputs, depth, bias).eval()
    copy.load_state_dict(plain.state_dict())
    init: Any = {"tile": True, "mini": "mini", "bat": "bat"}[variant]
    config = MissConfig(r=rank, init_weights=init, mini_r=mini_r, target_modules=targets or list(outputs))
    trained = get_peft_model(copy, config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in trained.named_parameters():
        if "miss_block" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    trained.save_pretrained(folder / adapter)
    return Case(base, folder / adapter, trained, plain)


def make_graph(
    case: Case,
    path: Path,
    form: str = "matmul",
    dtype: str = "float32",
    names: bool = True,
    external: bool = True,
    opset: int = 18,
    flat: bool = False,
) -> Path:
    """The plain model as a graph: x (batch, sequence, in), or (positions, in) if `flat` -> one output a layer.

    `form` is how a layer is computed: "matmul", "transpose" (stored (out, in)), "cast" (stored in float16, read as
    `dtype`), "gemm" and "gemm_transb" (flat only), "packed" (all layers of one input in one weight), "nbits"
    (MatMulNBits), "packed_nbits", "dequant" (DequantizeLinear). Without `names` nothing tells what is what.
    """
    kind, element = KINDS[dtype], NUMPY[dtype]
    lead: list[Any] = ["positions"] if flat else ["batch", "sequence"]
    nodes, constants, outputs = [], [], []
    inputs = case.plain.layers[0].q_proj.in_features
    for index, layer in enumerate(case.plain.layers):
        parts = {name: getattr(layer, name) for name in layer.names}
        if form.startswith("packed"):
            packed = torch.nn.Linear(
                inputs, sum(p.out_features for p in parts.values()), bias=layer.q_proj.bias is not None
            )
            packed.weight.data = torch.cat([part.weight.data for part in parts.values()])
            if packed.bias is not None:
                packed.bias.data = torch.cat([part.bias.data for part in parts.values()])
            parts = {"qkv_proj": packed}
        made = []
        for name, part in parts.items():
            label = f"/layers.{index}/{name}/MatMul" if names else f"n{len(nodes)}"
            stored = f"layers.{index}.{name}.weight" if names else f"c{len(constants)}"
            out = f"{label}_out"
            weight = part.weight.detach().numpy()
            has_bias = part.bias is not None
            added = f"{out}_biased" if has_bias and not form.startswith("gemm") else out
            if form in ("nbits", "packed_nbits"):
                codes, scales = quantize(weight)
                constants += [
                    numpy_helper.from_array(codes, f"{stored}_Q4"),
                    numpy_helper.from_array(scales.astype(element), f"{stored}_scales"),
                ]
                sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": 4, "block_size": 16}
                operands = ["x", f"{stored}_Q4", f"{stored}_scales"]
                nodes.append(helper.make_node("MatMulNBits", operands, [out], label, domain="com.microsoft", **sizes))
            elif form == "dequant":
                scale = np.abs(weight).max() / 127
                codes = np.round(weight.T / scale).astype(np.int8)
                constants += [
                    numpy_helper.from_array(codes, f"{stored}_quantized"),
                    numpy_helper.from_array(np.array(scale, np.float32), f"{stored}_scale"),
                ]
                operands = [f"{stored}_quantized", f"{stored}_scale"]
                nodes.append(helper.make_node("DequantizeLinear", operands, [f"{label}_w"], f"{label}_dq"))
                nodes.append(helper.make_node("MatMul", ["x", f"{label}_w"], [out], label))
            else:
                rows = form in ("transpose", "gemm_transb")
                held = np.float16 if form == "cast" else element
                values = np.ascontiguousarray((weight if rows else weight.T).astype(held))
                constants.append(numpy_helper.from_array(values, stored))
                operand = stored
                if form == "transpose":
                    nodes.append(helper.make_node("Transpose", [stored], [f"{label}_w"], f"{label}_t", perm=[1, 0]))
                    operand = f"{label}_w"
                if form == "cast":
                    nodes.append(helper.make_node("Cast", [stored], [f"{label}_w"], f"{label}_c", to=kind))
                    operand = f"{label}_w"
                if form.startswith("gemm"):
                    bias = []
                    if has_bias:
                        bias = [f"{stored}_b"]
                        constants.append(numpy_helper.from_array(part.bias.detach().numpy().astype(element), bias[0]))
                    nodes.append(
                        helper.make_node("Gemm", ["x", operand, *bias], [out], label, transB=int(form == "gemm_transb"))
                    )
                else:
                    nodes.append(helper.make_node("MatMul", ["x", operand], [out], label))
            if added != out:
                constants.append(numpy_helper.from_array(part.bias.detach().numpy().astype(element), f"{stored}_b"))
                nodes.append(helper.make_node("Add", [out, f"{stored}_b"], [added], f"{label}_add"))
            made.append(added)
        nodes.append(helper.make_node("Concat", made, [f"y{index}"], f"/layers.{index}/Concat", axis=-1))
        outputs.append(helper.make_tensor_value_info(f"y{index}", kind, [*lead, None]))
    graph = helper.make_graph(
        nodes, "layers", [helper.make_tensor_value_info("x", kind, [*lead, inputs])], outputs, constants
    )
    opsets = [helper.make_opsetid("", opset)]
    if "nbits" in form:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=16)
    return path


def quantize(weight: Array, block: int = 16) -> tuple[Array, Array]:
    """(N, K) to symmetric 4-bit codes (N, blocks, block/2) and scales (N, blocks), as MatMulNBits reads them."""
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    cut = padded.reshape(rows, blocks, block)
    scales = np.maximum(np.abs(cut).max(-1) / 7, 1e-8).astype(np.float32)
    codes = np.clip(np.round(cut / scales[..., None]) + 8, 0, 15).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def run(graph: Path, x: Array, adapter: Path | None = None, feeds: dict[str, Array] | None = None) -> Array:
    """The graph's outputs, stacked; with an adapter file active if one is given."""
    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    if feeds is None:
        kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_inputs()[0].type]
        feeds = {"x": x.astype(kind)}
    return np.stack(session.run(None, feeds, options))


def answers(model: Any, x: Array) -> Array:
    """What a torch model gives for `x`."""
    with torch.no_grad():
        found: Array = model(torch.from_numpy(x)).numpy()
    return found


def error(found: Array, want: Array) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - want) / np.linalg.norm(want))
