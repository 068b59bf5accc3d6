"""The rows as a Markdown document and as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common import table

from gpu.cases import PARTS, REPEATS, Case, LayerRow, ModelRow, OnnxRow, Row, Setup, cases, verdict
from gpu.journal import Entry

LAYER_COLUMNS = ("layer", "variant", "dtype", "trainer", "merged", "CPU = device", "PEFT = device")
MODEL_COLUMNS = ("variant", "dtype", "loss", "median position", "worst tenth", "top-1", "CPU = device")
ONNX_COLUMNS = ("mode", "layer", "variant", "dtype", "trainer", "graph", "swapped out")
SPEED_COLUMNS = ("part", "variant", "dtype", "what", "CPU, GB/s", "device, GB/s")


def in_order(setup: Setup, entries: Mapping[Case, Entry]) -> dict[str, list[Any]]:
    """The rows by part, each part in the order of its cases."""
    rows: dict[str, list[Any]] = {part: [] for part in PARTS}
    for case in cases(setup):
        if case in entries:
            rows[case.part].append(entries[case].row)
    return rows


def missing(setup: Setup, entries: Mapping[Case, Entry]) -> list[str]:
    """What has not been run, one line for each part and dtype."""
    counts = Counter((case.part, case.dtype) for case in cases(setup) if case not in entries)
    return [f"{part}, {dtype}: {count} rows" for (part, dtype), count in counts.items()]


def figures(
    setup: Setup, machine: Mapping[str, str], entries: Mapping[Case, Entry], left_out: Sequence[str]
) -> dict[str, Any]:
    """Everything that was found, for JSON."""
    rows = in_order(setup, entries)
    return {
        "machine": dict(machine),
        "setup": asdict(setup),
        "problems": verdict([row for part in PARTS for row in rows[part]]),
        "left_out": list(left_out),
        "missing": missing(setup, entries),
        **dict(zip(("seconds", "written", "peak"), _cost(entries.values()), strict=True)),
        "onnx_versions": _onnx_versions(entries.values()),
        **{part: [asdict(row) for row in rows[part]] for part in PARTS},
    }


def document(setup: Setup, machine: Mapping[str, str], entries: Mapping[Case, Entry], left_out: Sequence[str]) -> str:
    """The result as Markdown."""
    rows = in_order(setup, entries)
    layers, models, graphs = (rows[part] for part in PARTS)
    taken: list[Any] = [row for row in layers if row.speeds]
    taken += [row for row in models if row.seconds and len(row.seconds[0]) == REPEATS]
    found, absent = verdict([*layers, *models, *graphs]), missing(setup, entries)
    lines = found or ["Every row is within its bounds."]
    if absent:
        lines.append("Not the whole benchmark: rows are missing (see below).")
    seconds, written, peak = _cost(entries.values())
    versions = ", ".join(f"{name} {value}" for name, value in _onnx_versions(entries.values()).items())
    return f"""# Merges on the GPU against the CPU and the trained model

{", ".join(f"{name} {value}" for name, value in machine.items())}.

Shards trained for {setup.steps} AdamW steps at {setup.rate:g}; errors are relative to the unmerged model in float64;
"CPU = device" compares the merged bytes.

## Verdict

{_list(lines)}

## Layers

{table(LAYER_COLUMNS, map(_layer_cells, layers))}

## Model: 2 layers, hidden {setup.model.hidden}, intermediate {setup.model.inner}, vocabulary {setup.vocab}

Each cell is trainer / merged.

{table(MODEL_COLUMNS, map(_model_cells, models))}

## Throughput

Medians of {REPEATS}. merge_slab: one CPU thread; on the device with its transfers. Whole merges (their size is
given) read, write and sync, with threads for every core.

{table(SPEED_COLUMNS, map(_speed_cells, taken))}

## ONNX Runtime

{f"With {versions}." if versions else "Not run."}

{table(ONNX_COLUMNS, map(_onnx_cells, graphs))}

## What was left out, and what it took

{_list([*left_out, *(f"not run: {line}" for line in absent)] or ["Nothing was left out."])}

The rows took {seconds:.0f} s and {written / 1e9:.3f} GB of files, {peak / 1e9:.3f} GB at most at a time.
"""


def _cost(entries: Iterable[Entry]) -> tuple[float, int, int]:
    """Seconds and bytes written of all rows, and the most bytes that lay there at a time."""
    found = list(entries)
    peak = max((entry.peak for entry in found), default=0)
    return sum(entry.seconds for entry in found), sum(entry.written for entry in found), peak


def _onnx_versions(entries: Iterable[Entry]) -> dict[str, str]:
    return next((entry.versions for entry in entries if entry.versions), {})


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _layer_cells(row: LayerRow) -> list[str]:
    if row.ending:
        return [*row.head, row.ending, "", "", ""]
    trainer, merged = row.errors[0]
    return [*row.head, f"{trainer:.2e}", f"{merged:.2e}", str(row.devices), str(row.peft)]


def _model_cells(row: ModelRow) -> list[str]:
    loss = f"{row.losses[0]:.3f} → {row.losses[1]:.3f}"
    if row.ending:
        return [*row.head[1:], loss, row.ending, "", "", ""]
    pairs = [f"{trainer:.2e} / {merged:.2e}" for trainer, merged in row.errors]
    top1 = f"{row.top1[0]:.1%} / {row.top1[1]:.1%}"
    return [*row.head[1:], loss, *pairs, top1, str(row.devices)]


def _onnx_cells(row: OnnxRow) -> list[str]:
    if row.ending:
        return [row.mode, *row.head, row.ending, "", ""]
    trainer, graph = row.errors[0]
    back = "" if row.swapped_out is None else "equal" if row.swapped_out else "DIFFERENT"
    return [row.mode, *row.head, f"{trainer:.2e}", f"{graph:.2e}", back]


def _speed_cells(row: Row) -> list[str]:
    """In GB of weights a second: a byte that is read and written counts once."""
    if isinstance(row, ModelRow):
        speeds, what = [row.nbytes / statistics.median(runs) for runs in row.seconds], f"{row.nbytes / 1e9:.2f} GB"
    else:
        assert isinstance(row, LayerRow)
        speeds, what = list(row.speeds), "merge_slab"
    return [*row.head, what, *(f"{speed / 1e9:.2f}" for speed in speeds)]
