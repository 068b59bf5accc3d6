"""`fossil-export convert`."""

from __future__ import annotations

import click

from fossil_export._console import print_warnings, progress
from fossil_export._extras import of_base, of_names
from fossil_export.commands._command import Command, option
from fossil_export.commands._shared import adapter_argument, base_option, expect, json_option, show
from fossil_export.commands._types import FILE, FOLDER, Spelled
from fossil_export.converting._converters import CONVERTERS, OUTTYPES, Format, Outtype, takers
from fossil_export.tables import print_conversion

NEAREST = "Options of one format"

EXAMPLES = (
    "fossil-export convert my-adapter --to lora --output my-lora",
    "fossil-export convert my-adapter --to gguf-lora --output my-lora.gguf",
    "fossil-export convert old-bone-adapter --to miss --output my-miss",
)


@click.command(cls=Command, short_help="Write an adapter as a LoRA, for llama.cpp, and others.", examples=EXAMPLES)
@adapter_argument
@option(
    "--to",
    required=True,
    type=click.Choice(list(CONVERTERS)),
    metavar="FORMAT",
    help="; ".join(f"{name}: {converter.what}" for name, converter in CONVERTERS.items()) + ".",
)
@option(
    "-o", "--output", required=True, metavar="PATH", type=FILE, help="The folder or file to write; must not exist yet."
)
@option("--overwrite", is_flag=True, help="Replace what an earlier conversion wrote.")
@base_option()
@option(
    "--base-config",
    metavar="FILE",
    type=FILE,
    help=f"For {takers('base_config')}: the base's config.json, if the base is not here.",
)
@option(
    "--for",
    "graph",
    group=NEAREST,
    metavar="DIR",
    type=FOLDER,
    help=f"For {takers('graph')}: the swappable ONNX folder it is made for.",
)
@option("--rank", group=NEAREST, type=int, metavar="N", help=f"For {takers('rank')}: the nearest LoRA of this rank.")
@option(
    "--energy",
    group=NEAREST,
    type=float,
    metavar="SHARE",
    help=f"For {takers('energy')}: the nearest LoRA that keeps this share of the update, e.g. 0.99.",
)
@option(
    "--outtype",
    group=NEAREST,
    type=Spelled(list(OUTTYPES)),
    help=f"For {takers('outtype')}: how numbers are stored.  [default: f32]",
)
@json_option
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
    """Write ADAPTER in another format: a LoRA for PEFT, vLLM and llama.cpp, and others.

    ADAPTER is a folder, an id on the Hub or an address. Of the base only headers are read, for
    the nearest LoRA also weights, if the update depends on them.
    """
    from fossil_export.converting._conversion import convert as run_conversion

    expect(*CONVERTERS[to].needs, *of_names(adapter, output), *of_base(base))
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
    show(result.to_dict() if as_json else None, print_conversion, result)
    print_warnings(result.warnings)
