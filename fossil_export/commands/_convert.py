"""`fossil-export convert`."""

from __future__ import annotations

import click

from fossil_export._console import print_json, print_warnings, progress
from fossil_export.commands._shared import BASE_HELP
from fossil_export.converting._converters import CONVERTERS, OUTTYPES, Format, Outtype, takers
from fossil_export.tables import print_conversion


@click.command()
@click.argument("adapter")
@click.option(
    "--to",
    required=True,
    type=click.Choice(list(CONVERTERS)),
    help="; ".join(f"{name}: {converter.what}" for name, converter in CONVERTERS.items()) + ".",
)
@click.option("-o", "--output", required=True, metavar="PATH", help="Folder or file to write; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--base-config",
    metavar="FILE",
    help=f"{takers('base_config')}: the base's config.json, if the model itself is not here.",
)
@click.option("--for", "graph", metavar="DIR", help=f"{takers('graph')}: the swappable ONNX folder it is for.")
@click.option("--rank", type=int, metavar="N", help=f"{takers('rank')}: the nearest LoRA of this rank.")
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    help=f"{takers('energy')}: the nearest LoRA of the rank that keeps this share.",
)
@click.option("--outtype", type=click.Choice(list(OUTTYPES)), help=f"{takers('outtype')}: of numbers.  [default: f32]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier conversion wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    adapter: str,
    to: Format,
    output: str,
    base: str | None,
    base_config: str | None,
    graph: str | None,
    rank: int | None,
    energy: float | None,
    outtype: Outtype | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, a path or an id on the Hub, in another format. The model itself is not loaded."""
    from fossil_export.converting._conversion import convert as run_conversion

    result = run_conversion(
        adapter,
        output,
        to=to,
        base=base,
        base_config=base_config,
        graph=graph,
        rank=rank,
        energy=energy,
        outtype=outtype,
        overwrite=overwrite,
        progress=progress(),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_conversion(result)
    print_warnings(result.warnings)
