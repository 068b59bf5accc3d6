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
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common
import numpy as np
import smollm2
from onnx_variants import (
    ALIKE,
    BRANCHES,
    GRAPH,
    REFERENCE,
    WHOLE,
    Variant,
    activate,
    floors,
    load_file,
    make_feeds,
    make_graphs,
    open_session,
    open_variants,
    opened,
)

from fossil_export.onnx._adapter_file import ADAPTER

BURST = 0.2
"""Seconds of calls that make one measurement."""
SHAPES = ("prefill-1", "prefill-32", "prefill-128", "prefill-512", "decode-1", "decode-8")
Times = dict[str, list[float]]


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
    for number, name in common.turns(dict.fromkeys(times, loads + 1), shuffle=True):
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
    common.say(f"{precision}: opening sessions")
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
        common.say(f"{precision}: round {number + 1} of {options.rounds}")
        for shape, times in result["runs"].items():
            for name in random.sample(list(times), len(times)):
                times[name].append(burst(variants[name], feeds[shape]))
    return result


def section(title: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    return f"## {title}\n\n{common.table(columns, rows)}\n\n"


def report(precision: str, found: dict[str, Any]) -> str:
    """Markdown tables of what `measure` found."""
    own, floor = REFERENCE[precision], found["floors"]
    runs = {shape: common.medians(times) for shape, times in found["runs"].items()}
    ratios = {shape: {name: value / times[own] for name, value in times.items()} for shape, times in runs.items()}
    rows = [[name, *(f"{ratios[s][name]:.3f} ({runs[s][name]:.1f} ms)" for s in runs)] for name in found["differences"]]
    text = section(f"{precision}: run time, {own} = 1.00", ["", *runs], rows)
    longest = max((shape for shape in runs if shape.startswith("prefill")), key=lambda name: int(name[8:]), default="-")
    rows = []
    for name, method in BRANCHES.items():
        rows.append([name])
        for kind, shape in (("arithmetic", longest), ("bytes", "decode-1")):
            rows[-1] += [f"{floor[method][kind]:+.1%}", f"{ratios[shape][name] - 1:+.1%}" if shape in ratios else "-"]
    columns = ["", "floor, arithmetic", longest, "floor, bytes", "decode-1"]
    text += section(f"{precision}: what branches add, and the least they can", columns, rows)
    loads = common.medians(found["loads"])
    rows = [[name, f"{value:.0f}", f"{value / loads['plain']:.2f}"] for name, value in loads.items()]
    text += section(f"{precision}: opening a session", ["", "ms (median)", "against plain"], rows)
    rows = [[name, f"{value:.4f}"] for name, value in common.medians(found["adapters"]).items()]
    return text + section(f"{precision}: a {found['adapter_bytes'] / 1e6:.1f} MB adapter", ["", "ms (median)"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
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
    machine = common.machine("onnxruntime", "onnxruntime_genai")
    result: dict[str, Any] = {"caption": f"{base.name}, {adapter.name}; {options.rounds} rounds; {machine}"}
    text = result["caption"] + "\n\n"
    for precision in options.precision:
        result[precision] = measure(precision, base, adapter, options)
        text += report(precision, result[precision])
        if options.json:
            common.write_json(options.json, result)
        if options.output:
            common.publish(options.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
