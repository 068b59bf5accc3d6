"""`fossil-export verify`."""

from __future__ import annotations

import sys

import click

from fossil_export._console import echo, print_warnings, progress
from fossil_export._extras import FORWARD, of_base, of_names
from fossil_export._mapped import tell_of_cut_files
from fossil_export._threads import wait_asleep
from fossil_export.commands import _training as training
from fossil_export.commands._command import Command, option
from fossil_export.commands._shared import base_option, expect, json_option, show, trust_option, weighted
from fossil_export.commands._types import DEVICE, FILE, FOLDER
from fossil_export.tables import print_push_too, print_verification
from fossil_export.verifying._levels import LEVELS, Level

HUB = "Publishing"

EXAMPLES = (
    "fossil-export verify my-model",
    "fossil-export verify my-model --level weights",
    "fossil-export verify my-model --report parity.html",
)


@click.command(cls=Command, short_help="Check that a result is the model that was trained.", examples=EXAMPLES)
@click.argument("artifact", type=FILE)
@option(
    "--level",
    type=click.Choice(LEVELS),
    default="all",
    show_default=True,
    help="weights: compare every tensor; forward: run both models and compare their answers.",
)
@base_option(of="the record of ARTIFACT names")
@option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    type=FOLDER,
    help="What was merged; of several name all, in their order.  [default: those that the record names]",
)
@option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    type=DEVICE,
    help="Where to run models: cpu, cuda (or gpu), cuda:1.",
)
@option("--prompts", metavar="FILE", type=FILE, help="Your own prompts, one a line.  [default: built-in ones]")
@option("--report", metavar="FILE.html", type=FILE, help="Write a page with plots that opens offline.")
@trust_option
@training.trained_on
@training.double_quant
@option(
    "--push-to-hub",
    group=HUB,
    is_flag=True,
    help="Of an ARTIFACT on the Hub: commit the certificate, and quote it in the card.",
)
@option("--create-pr", group=HUB, is_flag=True, help="With --push-to-hub: open a pull request instead of committing.")
@json_option
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
    """Check that ARTIFACT is the model that was trained.

    ARTIFACT is a folder that `merge`, `onnx` or `convert --to lora` wrote, or its id on the Hub. Exits with 0 for
    parity, else with 1 and the first reason on one line. Writes fossil_parity.json into the folder, or with
    --push-to-hub on the Hub.
    """
    from fossil_export.verifying._verification import verify as check

    tell_of_cut_files()
    if create_pr and not push_to_hub:
        raise click.UsageError("--create-pr wants --push-to-hub.")
    seen = training.settings(trained_on, double_quant)
    if push_to_hub:
        from fossil_export.publishing._certify import publish_certificate, target_of

        target_of(artifact, create_pr)  # what will be refused is refused before hours of work
    wait_asleep()
    expect(*(() if level == "weights" else (FORWARD,)), *of_names(artifact, *adapters), *of_base(base))
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
    more = {"push": published.to_dict()} if published is not None else {}
    show(result.to_dict() | more if as_json else None, print_verification, result)
    if published is not None and not as_json:
        show(None, print_push_too, published)
    print_warnings(result.warnings + (published.warnings if published is not None else ()))
    if result.problems:
        others = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        echo(result.problems[0] + others, label="not the trained model: ", fg="red", err=True)
        sys.exit(1)
