"""`fossil-export push`."""

from __future__ import annotations

import click

from fossil_export.commands.shared import publishing, show
from fossil_export.console import lines, print_warnings
from fossil_export.tables import print_push


@click.command()
@click.argument("directory", metavar="DIR")
@click.argument("repo_id")
@publishing
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def push(
    directory: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    as_json: bool,
) -> None:
    """Publish DIR as REPO_ID on the Hub, with a model card, in one commit.

    DIR is a merged model, a LoRA or MISS adapter, an ONNX folder, or a GGUF file. What is no part of the model
    stays behind. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from fossil_export.publishing import push as publish

    with lines() as report:
        result = publish(
            directory,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            progress=report,
        )
    show(result.to_dict() if as_json else None, print_push, result)
    print_warnings(result.warnings)
