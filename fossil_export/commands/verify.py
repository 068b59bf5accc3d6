"""`fossil-export verify`."""

from __future__ import annotations

import sys

import click

from fossil_export.console import print_json, print_warnings, progress_bar
from fossil_export.tables import print_verification


@click.command()
@click.argument("artifact")
@click.option("--base", metavar="BASE", help="Base model.  [default: the one the artifact's record names]")
@click.option("--adapter", metavar="ADAPTER", help="Adapter.  [default: the one the artifact's record names]")
@click.option(
    "--level",
    type=click.Choice(["weights", "forward", "all"]),
    default="all",
    show_default=True,
    help="weights: every tensor (the shards, of a graph with branches); forward: logits against the trainer's.",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to run models: cpu, cuda, cuda:1."
)
@click.option("--prompts", metavar="FILE", help="Prompts, one a line.  [default: built-in ones]")
@click.option("--report", metavar="FILE.html", help="Write a page with plots that opens offline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    artifact: str,
    base: str | None,
    adapter: str | None,
    level: str,
    device: str,
    prompts: str | None,
    report: str | None,
    as_json: bool,
) -> None:
    """Is ARTIFACT what was trained?

    ARTIFACT is a folder that `merge`, `onnx` or `convert --to lora` wrote, or its id on the Hub. Exits with 0 for
    parity and with 1 otherwise, with the first reason on one line. Writes fossil_parity.json into the folder.
    """
    from fossil_export.verifying import verify as check

    with progress_bar(_weights_size(artifact) if level != "forward" else 0, "comparing") as progress:
        result = check(
            artifact,
            base=base,
            adapter=adapter,
            level=level,
            device=device,
            prompts=prompts,
            report=report,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_verification(result)
    print_warnings(result.warnings)
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        click.echo(click.style("not the trained model: ", fg="red") + result.problems[0] + more, err=True)
        sys.exit(1)


def _weights_size(artifact: str) -> int:
    from pathlib import Path

    return sum(path.stat().st_size for path in Path(artifact).glob("*.safetensors") if path.is_file())
