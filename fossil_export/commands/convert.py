"""`fossil-export convert`."""

from __future__ import annotations

import click

from fossil_export.commands.shared import BASE_HELP
from fossil_export.console import print_json, print_warnings
from fossil_export.tables import print_conversion


@click.command()
@click.argument("adapter")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["lora", "gguf-lora", "miss", "onnx-adapter"]),
    help="lora: a PEFT LoRA folder (PEFT, vLLM, SGLang); gguf-lora: a file for llama.cpp and Ollama; miss: today's "
    "PEFT MISS folder, from Bone and RWKV files; onnx-adapter: a file for a swappable ONNX folder.",
)
@click.option("-o", "--output", required=True, metavar="PATH", help="Folder or file to write; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option("--base-config", metavar="FILE", help="The base's config.json, where the model itself is not here.")
@click.option("--for", "graph", metavar="DIR", help="onnx-adapter: the swappable ONNX folder it is for.")
@click.option("--rank", type=int, metavar="N", help="lora, of a bat adapter: the nearest LoRA of this rank.")
@click.option(
    "--energy", type=float, metavar="SHARE", help="lora, of a bat adapter: of the rank that keeps this share."
)
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "q8_0"]),
    default="f32",
    show_default=True,
    help="gguf-lora: of numbers.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier conversion wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    adapter: str,
    to: str,
    output: str,
    base: str | None,
    base_config: str | None,
    graph: str | None,
    rank: int | None,
    energy: float | None,
    outtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, a path or an id on the Hub, in another format. The model itself is not loaded."""
    from fossil_export.converting import convert as run_conversion

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
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_conversion(result)
    print_warnings(result.warnings)
