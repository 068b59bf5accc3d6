"""`fossil-export push`."""

from __future__ import annotations

from typing import Any

import click

from fossil_export._console import print_warnings, progress
from fossil_export.commands._command import Command, option
from fossil_export.commands._shared import json_option, publishing, show
from fossil_export.commands._types import FILE
from fossil_export.tables import print_push, print_push_plan

EXAMPLES = (
    "fossil-export push my-model user/my-model --dry-run",
    "fossil-export push my-model user/my-model --private",
)


@click.command(cls=Command, short_help="Publish a result on the Hub, with a model card.", examples=EXAMPLES)
@click.argument("directory", metavar="DIR", type=FILE)
@click.argument("repo_id")
@publishing()
@option("--dry-run", is_flag=True, help="Print what would go and what stays; make and send nothing.")
@json_option
def push(
    directory: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish DIR as REPO_ID on the Hub, with a model card, in one commit.

    DIR is a merged model, an adapter of PEFT, an ONNX folder, or a GGUF file. What is no part of the model
    stays behind. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from fossil_export import publishing as hub

    target: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
    }
    if dry_run:
        plan = hub.plan_push(directory, repo_id, **target, progress=progress())
        show(plan.to_dict() if as_json else None, print_push_plan, plan)
        print_warnings(plan.warnings)
        return
    result = hub.push(directory, repo_id, progress=progress(), **target)
    show(result.to_dict() if as_json else None, print_push, result)
    print_warnings(result.warnings)
