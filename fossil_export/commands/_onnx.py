"""`fossil-export onnx`."""

from __future__ import annotations

from typing import Any

import click

from fossil_export._console import print_warnings, progress
from fossil_export._extras import of_base, of_names
from fossil_export._mapped import tell_of_cut_files
from fossil_export.commands._command import Command, option
from fossil_export.commands._shared import adapter_argument, base_option, expect, json_option, show, trust_option
from fossil_export.commands._types import DEVICE, FILE, FOLDER, Spelled
from fossil_export.onnx.builders import BUILDERS, MAKING, PRECISIONS
from fossil_export.onnx.modes import MODES
from fossil_export.tables import print_export, print_onnx_plan

_DEFAULTS = [f"{name} for {builder.models}" if builder.models else name for name, builder in BUILDERS.items()]


GRAPH = "Graph"

EXAMPLES = (
    "fossil-export onnx my-adapter --output my-chat",
    "fossil-export onnx my-adapter -o my-chat --mode swappable --precision int4",
    "fossil-export onnx my-adapter -o my-graph --onnx model.onnx --mode tiled",
)


@click.command(cls=Command, short_help="Write adapter and base as an ONNX folder.", examples=EXAMPLES)
@adapter_argument
@option("-o", "--output", metavar="DIR", type=FOLDER, help="The folder of the ONNX model; must not exist yet.")
@base_option()
@option("--overwrite", is_flag=True, help="Replace a folder that an earlier export wrote.")
@option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@option("--all", "every", is_flag=True, help="With --dry-run: a row for every weight, not for every kind.")
@option(
    "--mode",
    group=GRAPH,
    type=click.Choice(list(MODES)),
    metavar="MODE",
    default="merged",
    show_default=True,
    help="; ".join(f"{mode.name}: {mode.help}" for mode in MODES.values()) + ".",
)
@option(
    "--precision",
    group=GRAPH,
    type=Spelled(list(PRECISIONS)),
    help="Of the weights.  [default: fp32]",
)
@option(
    "--runtime",
    group=GRAPH,
    type=click.Choice(list(BUILDERS)),
    help="Who makes the graph. "
    + "; ".join(f"{builder.name}: {builder.help}" for builder in BUILDERS.values())
    + f".  [default: {', else '.join(_DEFAULTS)}]",
)
@option("--onnx", "graph", group=GRAPH, metavar="FILE.onnx", type=FILE, help="Use this graph of the base; make none.")
@option(
    "--copy-data", group=GRAPH, is_flag=True, help="With --onnx: copy the file of the weights instead of sharing it."
)
@option(
    "--device",
    group=GRAPH,
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    type=DEVICE,
    help="What the graph is made for: cpu or cuda (or gpu).",
)
@trust_option
@json_option
def onnx(
    adapter: str,
    output: str | None,
    base: str | None,
    mode: str,
    runtime: str | None,
    precision: str | None,
    graph: str | None,
    copy_data: bool,
    device: str,
    trust_remote_code: bool,
    dry_run: bool,
    every: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER and its base as an ONNX folder that ONNX Runtime or GenAI runs.

    ADAPTER is a folder, an id on the Hub or an address. The graph is made from the base, or is one you have (--onnx).
    More adapters for a swappable folder are made by `convert --to onnx-adapter`; `verify` runs the folder against
    the trained model.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' (or ask for the plan alone with '--dry-run').")
    if every and not dry_run:
        raise click.UsageError("--all wants --dry-run, whose rows it lists one by one.")
    from fossil_export.onnx._export import export_onnx
    from fossil_export.onnx._plan import of_graph, plan_onnx

    tell_of_cut_files()
    wanted: dict[str, Any] = {
        "base": base,
        "mode": mode,
        "runtime": runtime,
        "precision": precision,
        "onnx": graph,
        "copy_data": copy_data,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    making = BUILDERS[runtime].needs if runtime is not None else MAKING
    # A plan alone reads no more than a graph that is there.
    of_graphs = () if dry_run and graph is None else (making if graph is None else of_graph(mode),)
    expect(*of_graphs, *of_names(adapter), *of_base(base))
    if dry_run or output is None:
        plan = plan_onnx(adapter, **wanted, progress=progress())
        show(plan.to_dict() if as_json else None, lambda plan: print_onnx_plan(plan, every), plan)
        print_warnings(plan.warnings)
        return
    result = export_onnx(adapter, output, **wanted, overwrite=overwrite, progress=progress())
    show(result.to_dict() if as_json else None, print_export, result)
    print_warnings(result.warnings)
