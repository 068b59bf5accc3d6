"""Graphs given with `--onnx`: layers of one input in several forms. The judge puts what was trained into the damaged
graph itself, by the methods' formulas in NumPy, and has ONNX Runtime run both."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_file, damage_json
from torture.fuzz.protobuf import damage_graph
from torture.fuzz.subject import Subject, Unjudged

INPUTS, WIDTHS, LAYERS, RANK = 24, {"q_proj": 16, "k_proj": 8, "v_proj": 8}, 2, 4
MODES = ("merged", "tiled", "fused", "swappable")
GENAI = {
    "model": {
        "bos_token_id": 1,
        "type": "llama",
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 8,
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
            "outputs": {"logits": "logits"},
            "num_hidden_layers": 2,
        },
    },
    "search": {"max_length": 64, "do_sample": False},
}


@dataclass(frozen=True)
class Graphs:
    """`form` is how a layer is computed: "matmul", "gemm" (the weight as (out, in)), "packed" (all of one input in one
    weight), "nbits" (MatMulNBits). `damaged` is the file that is."""

    form: str
    damaged: str = "model.onnx"

    @property
    def name(self) -> str:
        return f"--onnx, {self.form}" if self.damaged == "model.onnx" else self.damaged

    def make(self, folder: Path) -> None:
        for library in ("onnx", "onnx_ir", "onnxruntime"):
            __import__(library)  # once, here, for all attempts
        make_base(folder)
        make_graph(folder, self.form)
        (folder / "graph" / "genai_config.json").write_text(json.dumps(GENAI))

    def mutate(self, folder: Path, random: Random) -> str:
        path = folder / "graph" / self.damaged
        if self.damaged == "model.onnx":
            return damage_graph(path, random)
        if self.damaged.endswith(".json"):
            return damage_json(path, random)
        if random.random() < 0.8:
            return damage_file(path, random)
        path.unlink()
        way = random.choice(("missing", "a folder", "a link out", "a loop"))
        if way == "a folder":
            path.mkdir()
        elif way == "a link out":
            path.symlink_to("/dev/zero")
        elif way == "a loop":
            path.symlink_to(path.name)
        return f"{path.name}: {way}"

    def command(self, folder: Path, random: Random) -> list[str]:
        mode = random.choice(MODES if self.form != "nbits" else MODES[2:])
        adapter = "lora" if mode != "tiled" and random.random() < 0.3 else "miss"
        given = folder / "graph" / random.choice(("model.onnx", ""))
        words = ["onnx", str(folder / adapter), "--base", str(folder / "base"), "--mode", mode, "--onnx", str(given)]
        return [*words, "--output", str(folder / "out"), *random.choice(([], [], ["--copy-data"]))]

    def judge(self, folder: Path) -> str | None:
        record = json.loads((folder / "out" / "fossil_export.json").read_text())
        if self.damaged == "genai_config.json":
            return None  # what comes along as it is
        updates = updates_of(folder, "lora" if record["adapter"]["peft_type"] == "LORA" else "miss")
        swappable = record["mode"] == "swappable"
        shutil.copytree(folder / "graph", folder / "judged")  # onnx refuses hard links
        given = folder / "judged" / "model.onnx"
        try:
            trained = with_updates(given, updates, folder)
            feeds, expected = run(trained, folder / "graph", None)
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:300]) from problem
        file = folder / "out" / "adapter.onnx_adapter" if swappable else None
        try:
            _, found = run((folder / "out" / record["graph"]), folder / "out", file, feeds)
        except Exception as problem:
            return f"the export does not run: {problem}"
        return difference(expected, found)


def make_base(folder: Path) -> None:
    """The base's folder, and two adapters that PEFT makes."""
    import torch
    from peft import LoraConfig, MissConfig, get_peft_model

    torch.manual_seed(0)
    plain = _model()
    (folder / "base").mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(
        {name: value.clone() for name, value in plain.state_dict().items()}, folder / "base" / "model.safetensors"
    )
    for name, config in (
        ("miss", MissConfig(r=RANK, target_modules=list(WIDTHS))),
        ("lora", LoraConfig(r=RANK, lora_alpha=8, target_modules=list(WIDTHS))),
    ):
        copy = _model()
        copy.load_state_dict(plain.state_dict())
        trained = get_peft_model(copy, config)
        with torch.no_grad():
            for label, parameter in trained.named_parameters():
                if "miss_" in label or "lora_" in label:
                    parameter.normal_(0, 0.1)
        trained.save_pretrained(folder / name)


def _model() -> Any:
    import torch

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, width in WIDTHS.items():
                setattr(self, name, torch.nn.Linear(INPUTS, width, bias=False))

    class Stack(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(LAYERS)])

    return Stack()


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {
        name.removesuffix(".weight"): value for name, value in load_file(folder / "base" / "model.safetensors").items()
    }


def updates_of(folder: Path, adapter: str) -> dict[str, Any]:
    """What is added to the weight (out, in) of each module, by the formulas of the papers."""
    import numpy as np
    from safetensors.numpy import load_file

    state = load_file(folder / adapter / "adapter_model.safetensors")
    found = {}
    for module in weights_of(folder):
        key = f"base_model.model.{module}"
        if adapter == "lora":
            found[module] = 2.0 * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
        else:
            found[module] = np.tile(state[f"{key}.miss_block"].T, (1, -(-INPUTS // RANK)))[:, :INPUTS]
    return found


def make_graph(folder: Path, form: str) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = weights_of(folder)
    nodes, constants, outputs, opsets = [], [], [], [helper.make_opsetid("", 18)]
    lead: list[Any] = ["rows"] if form == "gemm" else ["batch", "rows"]
    for layer in range(LAYERS):
        parts = {name: weights[f"layers.{layer}.{name}"] for name in WIDTHS}
        if form == "packed":
            parts = {"qkv_proj": np.concatenate(list(parts.values()))}
        for name, weight in parts.items():
            label, stored = f"/layers.{layer}/{name}/MatMul", f"layers.{layer}.{name}.weight"
            if form == "nbits":
                codes, scales = quantized(weight)
                constants += [
                    numpy_helper.from_array(codes, f"{stored}_Q4"),
                    numpy_helper.from_array(scales, f"{stored}_scales"),
                ]
                sizes = {"K": INPUTS, "N": len(weight), "bits": 4, "block_size": 16}
                operands = ["x", f"{stored}_Q4", f"{stored}_scales"]
                nodes.append(
                    helper.make_node("MatMulNBits", operands, [f"{label}_out"], label, domain="com.microsoft", **sizes)
                )
            else:
                rows = form == "gemm"
                constants.append(numpy_helper.from_array(np.ascontiguousarray(weight if rows else weight.T), stored))
                kind, more = ("Gemm", {"transB": 1}) if rows else ("MatMul", {})
                nodes.append(helper.make_node(kind, ["x", stored], [f"{label}_out"], label, **more))
        made = [f"/layers.{layer}/{name}/MatMul_out" for name in parts]
        nodes.append(helper.make_node("Concat", made, [f"y{layer}"], f"/layers.{layer}/Concat", axis=-1))
        outputs.append(helper.make_tensor_value_info(f"y{layer}", TensorProto.FLOAT, [*lead, sum(WIDTHS.values())]))
    if form == "nbits":
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*lead, INPUTS])]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", given, outputs, constants), opset_imports=opsets, ir_version=10
    )
    path = folder / "graph" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=16)


def quantized(weight: Any) -> tuple[Any, Any]:
    """(N, K) to 4-bit codes (N, blocks, 8) and scales (N, blocks), in blocks of 16."""
    import numpy as np

    blocks = -(-weight.shape[1] // 16)
    padded = np.zeros((len(weight), blocks * 16), np.float32)
    padded[:, : weight.shape[1]] = weight
    cut = padded.reshape(len(weight), blocks, 16)
    scales = np.maximum(np.abs(cut).max(-1) / 7, 1e-8).astype(np.float32)
    codes = np.clip(np.round(cut / scales[..., None]) + 8, 0, 15).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def with_updates(path: Path, updates: dict[str, Any], folder: Path) -> bytes:
    """The graph with its weights changed where they hold the base's; a branch beside a product of codes."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    weights, graph = weights_of(folder), model.graph
    left = set(weights)
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor).copy()
        changed = False
        for module, weight in weights.items():
            for turned in (False, True):
                view = values.T if turned else values
                if view.ndim != 2 or view.shape[1] != INPUTS or view.dtype.kind != "f":
                    continue
                for at in range(len(view) - len(weight) + 1):
                    if np.allclose(view[at : at + len(weight)], weight, 1e-6, 1e-7):
                        view[at : at + len(weight)] = weight + updates[module]
                        changed = True
                        left.discard(module)
        if changed:
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    codes = {name: quantized(weight)[0].tobytes() for name, weight in weights.items()} if left else {}
    held = {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMulNBits"]:
        for module in [module for module, content in codes.items() if content == held.get(node.input[1])]:
            name = f"judge {module}"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(updates[module].T), name))
            end = node.output[0]
            node.output[0] = f"{name} plain"
            graph.node.append(helper.make_node("MatMul", [node.input[0], name], [f"{name} branch"]))
            graph.node.append(helper.make_node("Add", [node.output[0], f"{name} branch"], [end]))
            left.discard(module)
    if left:
        raise ValueError(f"no weights of {sorted(left)} in it")
    ordered(graph)
    return bytes(model.SerializeToString())


def ordered(graph: Any) -> None:
    """Put the nodes behind those whose values they read."""
    known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
    rest, done = list(graph.node), []
    while rest:
        ready = [node for node in rest if known.issuperset(node.input)]
        if not ready:
            return
        done += ready
        known.update(name for node in ready for name in node.output)
        rest = [node for node in rest if node not in ready]
    del graph.node[:]
    graph.node.extend(done)


def run(graph: Path | bytes, folder: Path, adapter: Path | None, feeds: Any = None) -> tuple[Any, list[Any]]:
    """Inputs and outputs of a graph, by ONNX Runtime."""
    import numpy as np
    import onnxruntime as ort

    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    given = graph if isinstance(graph, bytes) else str(graph)
    session = ort.InferenceSession(given, settings, providers=["CPUExecutionProvider"])
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    if feeds is None:
        generator, feeds = np.random.default_rng(0), {}
        for one in session.get_inputs():
            shape = [size if isinstance(size, int) and size >= 0 else 3 for size in one.shape]
            if (
                one.type not in ("tensor(float)", "tensor(float16)", "tensor(double)")
                or np.prod(shape, dtype=float) > 1e6
            ):
                raise ValueError(f"input {one.name} of {one.type} {one.shape}")
            kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(one.type, np.float64)
            feeds[one.name] = generator.standard_normal(shape).astype(kind)
    return feeds, session.run(None, feeds, options)


def difference(expected: list[Any], found: list[Any]) -> str | None:
    import numpy as np

    if [one.shape for one in expected] != [one.shape for one in found]:
        return f"outputs {[one.shape for one in found]}, expected {[one.shape for one in expected]}"
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        with np.errstate(all="ignore"):
            if one.dtype.kind == "f" and not np.allclose(one, other, 1e-3, 1e-4, equal_nan=True):
                return f"output {number} differs by {np.nanmax(np.abs(one.astype(float) - other)):.2g}"
    return None


SUBJECTS: list[Subject] = [
    *(Graphs(form) for form in ("matmul", "gemm", "packed", "nbits")),
    Graphs("matmul", "model.onnx.data"),
    Graphs("matmul", "genai_config.json"),
]
