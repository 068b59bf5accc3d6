"""What an element and a GB cost in CPU seconds, measured by small merges of whole processes.

Merges that compute on nearly nothing tell what a process and a copied GB cost, the others what a method adds for each
element.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import common
import merge
import merge_quantized

VOCABULARY = 1024
METHODS = ("tile-64", "mini-64", "bat-64", "lora-16", "lora-64")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Constants:
    """`element` is CPU seconds for each element by kind (work.kind_of), `copied` for each byte that is taken as it is,
    `start` for a process that merges a tiny model, `memory` the largest peak of these merges in bytes."""

    element: dict[str, float]
    copied: float
    start: float
    memory: int

    def seconds(self, elements: dict[str, int], copied: int) -> float:
        """CPU seconds. Raises KeyError for a kind that was not measured."""
        return self.copied * copied + sum(count * self.element[kind] for kind, count in elements.items())

    def table(self) -> str:
        """In Markdown: methods by dtype, ns an element."""
        dtypes = [*DTYPES, "F8_E4M3"]
        rows = []
        for method in ("decode", *METHODS):
            found = [self.element.get(f"{method} {dtype}") for dtype in dtypes]
            rows.append([method, *("" if one is None else f"{one * 1e9:.2f}" for one in found)])
        text = common.table(["ns of CPU an element", *dtypes], rows)
        return (
            f"{text}\n\nCopied: {self.copied * 1e9:.2f} CPU-s a GB; a process: {self.start:.2f} CPU-s; largest peak of "
            f"these merges: {self.memory / 1e6:.0f} MB."
        )


def measured(work: Path, gigabytes: float, runs: int) -> Constants:
    """By merges into bases of that size, each `runs` times in turn; medians. Takes five times the size on the disk."""
    targets = [name.rpartition(".")[2] for name in merge.LINEARS]
    commands: dict[str, list[str]] = {}
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    tool = [sys.executable, "-m", "fossil_export", "merge"]
    output = work / "output"

    def add(kind: str, adapter: Path, base: Path) -> None:
        commands[kind] = [*tool, str(adapter), "--base", str(base), "-o", str(output)]

    linear = sum(rows * columns for rows, columns in merge.LINEARS.values())
    keys = merge.LINEARS["self_attn.k_proj"]
    plain = work / f"constants-{gigabytes:g}-bfloat16"
    for short, dtype in DTYPES.items():
        base = work / f"constants-{gigabytes:g}-{dtype}"
        layers = merge.make_base(base, gigabytes, dtype, VOCABULARY)
        for method in METHODS:
            name, rank = method.split("-")
            adapter = work / f"constants-{gigabytes:g}-{method}-{short}"
            given = {"lora": int(rank)} if name == "lora" else {"variant": name}
            merge.make_adapter(adapter, base, layers, targets, **given)
            add(f"{method} {short}", adapter, base)
            elements[f"{method} {short}"] = layers * linear
        one = work / f"constants-{gigabytes:g}-one"
        merge.make_adapter(one, base, 1, ["k_proj"])
        add(f"copy {short}", one, base)
        elements[f"copy {short}"] = keys[0] * keys[1]
        sizes[short] = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    layers = merge.make_base(plain, gigabytes, "bfloat16", VOCABULARY)
    coded = work / f"constants-{gigabytes:g}-fp8"
    merge_quantized.make_quantized(coded, "fp8", layers, plain, VOCABULARY)
    for method in ("tile-64", "lora-16", "lora-64"):
        add(f"{method} F8_E4M3", work / f"constants-{gigabytes:g}-{method}-BF16", coded)
        elements[f"{method} F8_E4M3"] = layers * linear
    add("decode F8_E4M3", work / f"constants-{gigabytes:g}-one", coded)
    elements["decode F8_E4M3"] = layers * linear
    tiny = work / "constants-tiny"
    merge.make_base(tiny, 0.0, "bfloat16", 8)
    add("start", work / f"constants-{gigabytes:g}-one", tiny)
    tiny_size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))

    found: dict[str, list[tuple[float, int, float]]] = {}
    for number, kind in common.turns(dict.fromkeys(commands, runs)):
        shutil.rmtree(output, ignore_errors=True)
        found.setdefault(kind, []).append(common.spent(commands[kind]))
        common.say(f"{kind}, run {number + 1}: {found[kind][-1][2]:.2f} CPU-s")
    shutil.rmtree(output, ignore_errors=True)
    cpu = {kind: statistics.median(one[2] for one in own) for kind, own in found.items()}
    spent = sum(cpu[f"copy {short}"] - cpu["start"] for short in DTYPES)
    copied = max(0.0, spent / (sum(sizes.values()) - len(sizes) * tiny_size))
    start = max(0.0, cpu["start"] - copied * tiny_size)
    element = {}
    for kind, count in elements.items():
        method, short = kind.split()
        if short == "F8_E4M3":  # nothing of it is copied
            element[kind] = (cpu[kind] - start) / count
        elif method != "copy":
            nothing = sizes[short] * copied + start
            element[kind] = max(0.0, cpu[kind] - nothing + count * _bytes(short) * copied) / count
    return Constants(element, copied, start, max(one[1] for own in found.values() for one in own))


def _bytes(short: str) -> int:
    return 4 if short == "F32" else 2
