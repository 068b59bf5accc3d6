"""`fossil-export onnx`."""

from __future__ import annotations

from typing import Any

import click

from fossil_export._console import print_warnings, progress
from fossil_export._mapped import tell_of_cut_files
from fossil_export.commands._shared import BASE_HELP, show, trust_option
from fossil_export.onnx.builders import BUILDERS, PRECISIONS
from fossil_export.onnx.modes import MODES
from fossil_export.tables import print_export, print_onnx_plan

_DEFAULTS = [f"{name} for {builder.models}" if builder.models else name for name, builder in BUILDERS.items()]


@click.command()
@click.argument("adapter")
@click.option("-o", "--output", metavar="DIR", help="Folder of the ONNX model; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--mode",
    type=click.Choice(list(MODES)),
    default="merged",
    show_default=True,
    help="; ".join(f"{mode.name}: {mode.help}" for mode in MODES.values()) + ".",
)
@click.option(
    "--runtime",
    type=click.Choice(list(BUILDERS)),
    help="Who makes the graph; "
    + "; ".join(f"{builder.name}: {builder.help}" for builder in BUILDERS.values())
    + f".  [default: {', else '.join(_DEFAULTS)}]",
)
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Of the graph's weights.  [default: fp32]")
@click.option("--onnx", "graph", metavar="FILE.onnx", help="Use this graph of the base instead of making one.")
@click.option("--copy-data", is_flag=True, help="With --onnx: copy the weights' file instead of sharing it.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="What the graph is made for.")
@trust_option
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--all", "every", is_flag=True, help="With --dry-run: a row for every weight, not for every kind.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier export wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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

    ADAPTER is a path or an id on the Hub. The graph is made from the base, or is one you have (--onnx). More
    adapters for a swappable folder are made by `convert --to onnx-adapter`; `verify` runs the folder against the
    trained model.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' (or ask for the plan alone with '--dry-run').")
    from fossil_export.onnx._export import export_onnx
    from fossil_export.onnx._plan import plan_onnx

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
    if dry_run or output is None:
        plan = plan_onnx(adapter, **wanted, progress=progress())
        show(plan.to_dict() if as_json else None, lambda plan: print_onnx_plan(plan, every), plan)
        print_warnings(plan.warnings)
        return
    result = export_onnx(adapter, output, **wanted, overwrite=overwrite, progress=progress())
    show(result.to_dict() if as_json else None, print_export, result)
    print_warnings(result.warnings)
