"""What the ONNX variants of one adapter cost against each other: run time, load time, switching, and the floors.

    python benchmarks/onnx_graphs.py --rounds 15 --json onnx.json --output onnx.md

exports SmolLM2-135M with the demo's adapter (tile, r = 64, all linears) in every mode from one plain graph of GenAI's
builder, adds LoRA branches of the same rank and effect (x A B + y as MatMul, MatMul, Add, the shape Olive emits; one A
for the packed q, k, v where real ones have three), as constants and as optional inputs, and times all in one process:
in every round each variant has its turn, in random order. Ratios are of medians of rounds; the reference is opened
twice, and its second row shows the noise. `--work` keeps what the builder made of this base and adapter, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import smollm2

from fossil_export import __version__, export_onnx
from fossil_export.adapters import load_adapter
from fossil_export.merging.plan import plan_merge
from fossil_export.onnx.adapter_file import ADAPTER
from fossil_export.onnx.builders import BUILDERS
from fossil_export.onnx.builders.existing import share_data
from fossil_export.onnx.graph.edit import Editor
from fossil_export.onnx.graph.sites import find_sites
from fossil_export.onnx.modes import MODES, ModeName
from fossil_export.onnx.places import OpenGraph, open_graph

GRAPH, PAST, BURST = "model.onnx", 128, 0.2
"""`PAST` tokens come before a decoded one; `BURST` seconds of calls make one measurement."""
SHAPES = ("prefill-1", "prefill-32", "prefill-128", "prefill-512", "decode-1", "decode-8")
REFERENCE = {"fp32": "merged", "int4": "plain"}
WHOLE = {"fp32": ("merged", "merged again", "plain", "tiled"), "int4": ("plain", "plain again", "merged")}
BRANCHES = {"fused": "FOSSIL", "swappable, adapter": "FOSSIL", "LoRA": "LoRA", "LoRA, swappable": "LoRA"}  # by method
ALIKE = {"merged again": "merged", "plain again": "plain"}
Times = dict[str, list[float]]


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
        shard, name = graph.low_rank(place), f"{place.label}/lora"
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
        print(f"{precision}: making {mode}", file=sys.stderr, flush=True)
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
        rank, width = len(graph.low_rank(place)), ir.DataType[nodes[0].activation].itemsize
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


def check(precision: str, variants: dict[str, Variant], head: int) -> dict[str, float]:
    """Largest relative differences of logits. Raises SystemExit where they should agree and do not."""
    limit, trained = (1e-3, "merged") if precision == "fp32" else (5e-2, "fused")
    worst: dict[str, float] = {}
    for shape in ("prefill-16", "decode-2"):
        feeds = make_feeds(variants["plain"].session, shape, head)
        logits = {name: variant.run(feeds)[0].numpy() for name, variant in variants.items()}
        for name, found in logits.items():
            truth = logits["plain" if name in ("plain again", "swappable, none") else trained]
            error = float(np.abs(found - truth).max() / np.abs(truth).max())
            worst[name] = max(worst.get(name, 0.0), error)
            # Plain lacks the adapter, and int4's merged weights were quantized after the merge.
            if not error <= limit and name != "plain" and (precision, name) != ("int4", "merged"):
                raise SystemExit(f"{precision}, {shape}: the logits of {name} are off by {error:.1e}")
    return worst


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds of one call; what it returns is freed after them."""
    started = time.perf_counter()
    _result = call(*arguments)
    return (time.perf_counter() - started) * 1e3


def burst(variant: Variant, feeds: dict[str, Any]) -> float:
    """The median of the calls of `BURST` seconds, at least one, after one untimed call."""
    variant.run(feeds)
    times: list[float] = []
    while sum(times) < BURST * 1e3:
        times.append(timed(variant.run, feeds))
    return statistics.median(times)


def measure_loads(graphs: dict[str, Path], loads: int) -> Times:
    """Opening fresh sessions with default options; the files are in memory from an untimed one."""
    times: Times = {name: [] for name in ("plain", "plain again", *graphs) if "LoRA" not in name}
    for number in range(loads + 1):
        for name in random.sample(list(times), len(times)):
            spent = timed(open_session, graphs[ALIKE.get(name, name)] / GRAPH, True)
            times[name] += [spent] if number else []
    return times


def measure_adapters(folder: Path, count: int) -> Times:
    """Loading an adapter file that is in memory, and switching between two that are loaded."""
    file = folder / ADAPTER
    held = [load_file(file), load_file(file)]
    times: Times = {
        "ONNX Runtime: LoraAdapter.Load": [timed(load_file, file) for _ in range(count)],
        "ONNX Runtime: RunOptions, add_active_adapter": [timed(activate, held[number % 2]) for number in range(count)],
    }
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return times
    model = genai.Model(str(folder))
    adapters = genai.Adapters(model)
    loads, switches = "GenAI: Adapters.load", "GenAI: set_active_adapter"
    times[loads] = [timed(adapters.load, str(file), str(number)) for number in range(count)]
    generator = genai.Generator(model, genai.GeneratorParams(model))
    times[switches] = [timed(generator.set_active_adapter, adapters, str(number % 2)) for number in range(count)]
    return times


def measure(precision: str, base: Path, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one precision, ready for JSON; all times are in milliseconds."""
    graphs = make_graphs(precision, base, adapter, options.work)
    config = json.loads((base / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    print(f"{precision}: opening sessions", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "floors": floors(opened(base, adapter, graphs["plain"] / GRAPH)),
        "adapter_bytes": (graphs["swappable"] / ADAPTER).stat().st_size,
        "adapters": measure_adapters(graphs["swappable"], max(10, options.loads)),
        "loads": measure_loads(graphs, options.loads),
    }
    variants = open_variants(precision, graphs)
    result["differences"] = check(precision, variants, head)
    feeds = {shape: make_feeds(variants["plain"].session, shape, head) for shape in options.shapes}
    result["runs"] = {shape: {name: [] for name in variants} for shape in feeds}
    for number in range(options.rounds):
        print(f"{precision}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for shape, times in result["runs"].items():
            for name in random.sample(list(times), len(times)):
                times[name].append(burst(variants[name], feeds[shape]))
    return result


def table(title: str, *rows: list[str]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "\n"])


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def report(precision: str, found: dict[str, Any]) -> str:
    """Markdown tables of what `measure` found."""
    own, floor = REFERENCE[precision], found["floors"]
    runs = {shape: medians(times) for shape, times in found["runs"].items()}
    ratios = {shape: {name: value / times[own] for name, value in times.items()} for shape, times in runs.items()}
    rows = [[name, *(f"{ratios[s][name]:.3f} ({runs[s][name]:.1f} ms)" for s in runs)] for name in found["differences"]]
    text = table(f"{precision}: run time, {own} = 1.00", ["", *runs], *rows)
    longest = max((shape for shape in runs if shape.startswith("prefill")), key=lambda name: int(name[8:]), default="-")
    rows = [["", "floor, arithmetic", longest, "floor, bytes", "decode-1"]]
    for name, method in BRANCHES.items():
        rows.append([name])
        for kind, shape in (("arithmetic", longest), ("bytes", "decode-1")):
            rows[-1] += [f"{floor[method][kind]:+.1%}", f"{ratios[shape][name] - 1:+.1%}" if shape in ratios else "-"]
    text += table(f"{precision}: what branches add, and the least they can", *rows)
    loads = medians(found["loads"])
    rows = [[name, f"{value:.0f}", f"{value / loads['plain']:.2f}"] for name, value in loads.items()]
    text += table(f"{precision}: opening a session", ["", "ms (median)", "against plain"], *rows)
    rows = [[name, f"{value:.4f}"] for name, value in medians(found["adapters"]).items()]
    return text + table(f"{precision}: a {found['adapter_bytes'] / 1e6:.1f} MB adapter", ["", "ms (median)"], *rows)


def caption(base: Path, adapter: Path, rounds: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    parts = [f"{base.name}, {adapter.name}", f"{cpu}, {os.cpu_count()} cores", f"{rounds} rounds"]
    names = [packages_distributions().get(module) for module in ("onnxruntime", "onnxruntime_genai")]
    parts += [f"{name[0]} {version(name[0])}" for name in names if name]
    return "; ".join([*parts, f"fossil-export {__version__}", f"Python {platform.python_version()}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=list(WHOLE), default=list(WHOLE))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="prefill-TOKENS, decode-BATCH")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loads", type=int, default=10, help="sessions opened of each graph (default 10)")
    parser.add_argument("--base", type=Path, help="folder of a Llama-like model (default SmolLM2-135M-Instruct)")
    parser.add_argument("--adapter", type=Path, help="folder of its adapter, tile or mini (default the demo's)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fossil-export-onnx")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--output", type=Path, help="file for the tables, which are printed too")
    options = parser.parse_args(arguments)
    random.seed(0)
    base, adapter = options.base or smollm2.base_model(), options.adapter or smollm2.adapter()
    result: dict[str, Any] = {"caption": caption(base, adapter, options.rounds)}
    text = result["caption"] + "\n\n"
    for precision in options.precision:
        result[precision] = measure(precision, base, adapter, options)
        text += report(precision, result[precision])
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))
        if options.output:
            options.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
