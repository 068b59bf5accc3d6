"""`fossil-export verify`."""

from __future__ import annotations

import sys

import click

from fossil_export._answers import TRAINED_ON
from fossil_export._console import echo, print_json, print_warnings, progress
from fossil_export._mapped import tell_of_cut_files
from fossil_export.commands._merge import _settings
from fossil_export.commands._shared import trust_option, weighted
from fossil_export.tables import print_push, print_verification
from fossil_export.verifying._levels import LEVELS, Level


@click.command()
@click.argument("artifact")
@click.option("--base", metavar="BASE", help="Base model.  [default: the one the artifact's record names]")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="Adapter; of several name all, in their order.  [default: those the artifact's record names]",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="all",
    show_default=True,
    help="weights: every tensor (what was trained, of a graph with branches); forward: logits against the trainer's.",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to run models: cpu, cuda, cuda:1."
)
@click.option(
    "--trained-on",
    type=click.Choice(TRAINED_ON),
    default="auto",
    show_default=True,
    help="What the base was quantized to while the adapter was trained; auto: what the record or its files say.",
)
@click.option(
    "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
    "double_quant",
    default=None,
    help="With --trained-on nf4 or fp4: were the scales quantized, too?  [default: what the adapter's files say]",
)
@trust_option
@click.option("--prompts", metavar="FILE", help="Prompts, one a line.  [default: built-in ones]")
@click.option("--report", metavar="FILE.html", help="Write a page with plots that opens offline.")
@click.option(
    "--push-to-hub", is_flag=True, help="Of an ARTIFACT on the Hub: commit the certificate, and quote it in the card."
)
@click.option("--create-pr", is_flag=True, help="With --push-to-hub: open a pull request instead of committing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    artifact: str,
    base: str | None,
    adapters: tuple[str, ...],
    level: Level,
    device: str,
    trained_on: str,
    double_quant: bool | None,
    trust_remote_code: bool,
    prompts: str | None,
    report: str | None,
    push_to_hub: bool,
    create_pr: bool,
    as_json: bool,
) -> None:
    """Is ARTIFACT what was trained?

    ARTIFACT is a folder that `merge`, `onnx` or `convert --to lora` wrote, or its id on the Hub. Exits with 0 for
    parity and with 1 otherwise, with the first reason on one line. Writes fossil_parity.json into the folder; on the
    Hub, with --push-to-hub.
    """
    from fossil_export.verifying._verification import verify as check

    tell_of_cut_files()
    if create_pr and not push_to_hub:
        raise click.UsageError("--create-pr wants --push-to-hub.")
    seen = _settings(trained_on, double_quant, None, None, None)
    if push_to_hub:
        from fossil_export.publishing._certify import publish_certificate, target_of

        target_of(artifact, create_pr)  # what will be refused is refused before hours of work
    result = check(
        artifact,
        base=base,
        adapter=[weighted(given) for given in adapters] or None,
        level=level,
        device=device,
        prompts=prompts,
        report=report,
        trained_on=seen,
        trust_remote_code=trust_remote_code,
        progress=progress(),
    )
    published = None
    if push_to_hub:
        published = publish_certificate(result, create_pr=create_pr, progress=progress())
    if as_json:
        print_json(result.to_dict() | ({"push": published.to_dict()} if published is not None else {}))
    else:
        print_verification(result)
        if published is not None:
            print_push(published)
    print_warnings(result.warnings + (published.warnings if published is not None else ()))
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        echo(result.problems[0] + more, label="not the trained model: ", fg="red", err=True)
        sys.exit(1)
