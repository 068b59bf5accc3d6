"""`fossil-export onnx`."""

from __future__ import annotations

import click

from fossil_export.commands.shared import BASE_HELP
from fossil_export.console import print_json, print_warnings, steps
from fossil_export.tables import print_export


@click.command()
@click.argument("adapter")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder of the ONNX model; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--mode",
    type=click.Choice(["merged", "tiled", "fused", "swappable"]),
    default="merged",
    show_default=True,
    help="merged: plain graph; tiled: base weights shared, sum folded at load; fused: branches with the shards "
    "inside; swappable: adapters loaded while the session runs.",
)
@click.option(
    "--runtime",
    type=click.Choice(["genai", "torch"]),
    help="Who makes the graph.  [default: genai for generative models, else torch]",
)
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int4"]), help="Of the graph's weights.  [default: fp32]"
)
@click.option("--onnx", "graph", metavar="FILE.onnx", help="Use this graph of the base instead of making one.")
@click.option("--copy-data", is_flag=True, help="With --onnx: copy the weights' file instead of sharing it.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="What the graph is made for.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier export wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def onnx(
    adapter: str,
    output: str,
    base: str | None,
    mode: str,
    runtime: str | None,
    precision: str | None,
    graph: str | None,
    copy_data: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER and its base as an ONNX folder that ONNX Runtime or GenAI runs.

    ADAPTER is a path or an id on the Hub. The graph is made from the base, or is one you have (--onnx). More
    adapters for a swappable folder are made by `convert --to onnx-adapter`; `verify` runs the folder against the
    trained model.
    """
    from fossil_export.onnx.api import export_onnx

    with steps() as progress:
        result = export_onnx(
            adapter,
            output,
            base=base,
            mode=mode,
            runtime=runtime,
            precision=precision,
            onnx=graph,
            copy_data=copy_data,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_export(result)
    print_warnings(result.warnings)
