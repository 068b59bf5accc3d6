"""The graphs that onnx_graphs.py compares, LoRA branches among them; how they are run, and the least they can cost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from fossil_export import export_onnx
from fossil_export.adapters import load_adapter
from fossil_export.merging._planning import plan_merge
from fossil_export.onnx._adapter_file import ADAPTER
from fossil_export.onnx._places import OpenGraph, open_graph
from fossil_export.onnx.builders import BUILDERS
from fossil_export.onnx.builders._existing import share_data
from fossil_export.onnx.graph._edit import Editor
from fossil_export.onnx.graph._sites import find_sites
from fossil_export.onnx.modes import MODES, ModeName

GRAPH = "model.onnx"
PAST = 128
"""Tokens that come before a decoded one."""
REFERENCE = {"fp32": "merged", "int4": "plain"}
WHOLE = {"fp32": ("merged", "merged again", "plain", "tiled"), "int4": ("plain", "plain again", "merged")}
BRANCHES = {"fused": "FOSSIL", "swappable, adapter": "FOSSIL", "LoRA": "LoRA", "LoRA, swappable": "LoRA"}  # by method
ALIKE = {"merged again": "merged", "plain again": "plain"}


def opened(base: Path, adapter: Path, graph: Path) -> OpenGraph:
    """The plain graph, with the places where the adapter's shards belong."""
    return open_graph(plan_merge(load_adapter(adapter), base, dtype="auto"), MODES["fused"], graph)


def make_lora(graph: OpenGraph, folder: Path, swappable: bool = False) -> Path:
    """The plain graph with LoRA branches that add what the shards add: A is the 0/1 tiling, B is D."""
    folder.mkdir(parents=True, exist_ok=True)
    editor = Editor(graph.model)
    values: dict[str, Any] = {}

    def operand(name: str, array: Any, dims: list[Any]) -> ir.Value:
        if not swappable:
            return editor.constant(name, array)
        values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        empty = array[:, :0] if dims[1] == "rank" else array[:0]
        value = editor.initializer(name, ir.tensor(empty, name=name))
        value.shape = ir.Shape(dims)
        editor.graph.inputs.append(value)
        return value

    for place in graph.places:
        shard, name = graph.branch(place).up, f"{place.label}/lora"
        tiling = (np.arange(place.inputs)[:, None] % len(shard) == np.arange(len(shard))).astype(np.float32)
        a = operand(f"{place.label}.lora_A.weight", tiling, [place.inputs, "rank"])
        b = operand(f"{place.label}.lora_B.weight", shard, ["rank", place.outputs])
        for site in graph.sites[place.label]:
            down = editor.node("MatMul", [site.x, a], f"{name}_A/MatMul", after=site.node)
            up = editor.node("MatMul", [down, b], f"{name}_B/MatMul", after=down.producer(), shape=site.y.shape)
            added = editor.node("Add", [site.y, up], f"{name}/Add", after=up.producer(), shape=site.y.shape)
            editor.replace(site.y, added, keep=[added.producer()])
    share_data(graph.path, folder, copy=True)
    editor.save(folder / GRAPH)
    if swappable:
        adapter = ort.AdapterFormat()
        adapter.set_parameters(values)
        adapter.export_adapter(str(folder / ADAPTER))
    return folder


def make_graphs(precision: str, base: Path, adapter: Path, work: Path) -> dict[str, Path]:
    """A folder for each graph, by name; only what GenAI's builder makes is reused."""
    made = {"plain": work / precision / "plain"}
    graph = made["plain"] / GRAPH
    if not graph.is_file():
        made["plain"].mkdir(parents=True, exist_ok=True)
        BUILDERS["genai"].build(base, made["plain"], precision, "cpu")
    modes: tuple[ModeName, ...] = ("merged", "tiled", "fused", "swappable")
    for mode in modes if precision == "fp32" else ("merged", "fused", "swappable"):
        common.say(f"{precision}: making {mode}")
        made[mode] = work / precision / mode
        if (precision, mode) != ("int4", "merged"):
            export_onnx(adapter, made[mode], base=base, mode=mode, onnx=graph, copy_data=True, overwrite=True)
        elif not made[mode].exists():
            export_onnx(adapter, made[mode], base=base, mode=mode, runtime="genai", precision="int4")
    made["LoRA"] = make_lora(opened(base, adapter, graph), work / precision / "lora")
    made["LoRA, swappable"] = make_lora(opened(base, adapter, graph), work / precision / "lora-swappable", True)
    return made


def floors(graph: OpenGraph) -> dict[str, dict[str, float]]:
    """What branches add at least: multiplications over the graph's (the head's too), bytes over its weights'."""
    sites = find_sites(graph.model.graph)
    products = sum(site.weight.inputs * site.weight.outputs for site in sites)
    tensors = {id(value): value.const_value for site in sites for value in site.node.inputs[1:] if value is not None}
    nbytes = sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)
    found = {method: {"arithmetic": 0.0, "bytes": 0.0} for method in ("FOSSIL", "LoRA")}
    for place in graph.places:
        nodes = graph.sites[place.label]
        rank, width = len(graph.branch(place).up), ir.DataType[nodes[0].activation].itemsize
        for method, lines in (("FOSSIL", place.outputs), ("LoRA", place.inputs + place.outputs)):
            found[method]["arithmetic"] += len(nodes) * rank * lines / products
            found[method]["bytes"] += rank * lines * width / nbytes
    return found


def open_session(graph: Path, default: bool = False) -> Any:
    """A session on the CPU with default threads, which sleep while it is not running unless all is `default`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # else a warning for each optional input
    options.add_session_config_entry("session.force_spinning_stop", "0" if default else "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def load_file(path: Path) -> Any:
    adapter = ort.LoraAdapter()
    adapter.Load(str(path))
    return adapter


def activate(adapter: Any) -> Any:
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    return options


class Variant:
    """A session of a graph, with the adapter file beside it where that is wanted."""

    def __init__(self, folder: Path, swap: bool = False) -> None:
        self.session = open_session(folder / GRAPH)
        self._outputs = [output.name for output in self.session.get_outputs()]
        self._adapter = load_file(folder / ADAPTER) if swap else None  # the options only point to it
        self._options = activate(self._adapter) if swap else None

    def run(self, feeds: dict[str, Any]) -> Any:
        """All outputs, which are not copied."""
        return self.session.run_with_ort_values(self._outputs, feeds, self._options)


def make_feeds(session: Any, shape: str, head: int) -> dict[str, Any]:
    """Random tokens, after the past of others in this session; `head` is the width of a head, which it leaves open."""
    kind, _, size = shape.partition("-")
    batch, tokens = (1, int(size)) if kind == "prefill" else (int(size), 1 + PAST)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "input_ids": rng.integers(0, int(session.get_outputs()[0].shape[-1]), (batch, tokens)),
        "attention_mask": np.ones((batch, tokens), np.int64),
        "position_ids": np.tile(np.arange(tokens), (batch, 1)),
    }
    names = [value.name for value in session.get_inputs()]
    caches = {value.name: value.shape[1] for value in session.get_inputs() if value.name not in arrays}
    arrays |= {name: np.zeros((batch, heads, 0, head), np.float32) for name, heads in caches.items()}
    if kind == "decode":
        past = {name: arrays[name][:, :PAST] if arrays[name].ndim == 2 else arrays[name] for name in names}
        present = dict(zip((output.name for output in session.get_outputs()), session.run(None, past), strict=True))
        arrays |= {name: arrays[name][:, PAST:] for name in ("input_ids", "position_ids")}
        arrays |= {name: present[name.replace("past_key_values", "present")] for name in caches}
    return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(arrays[name])) for name in names}


def open_variants(precision: str, graphs: dict[str, Path]) -> dict[str, Variant]:
    """Opened in random order, after one that nobody uses, since the first session of a process is often slower."""
    names = [*WHOLE[precision], *BRANCHES, "swappable, none"]
    opened = {"": Variant(graphs[REFERENCE[precision]])}
    for name in random.sample(names, len(names)):
        folder = graphs.get(ALIKE.get(name, name), graphs["swappable"])
        opened[name] = Variant(folder, name in ("swappable, adapter", "LoRA, swappable"))
    return {name: opened[name] for name in names}
