"""What `fossil-export merge` was asked to do, and which of its options exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from fossil_export.storage.fsspec._addresses import is_object_address


@dataclass(frozen=True)
class Asked:
    """The command's options, by the names of its parameters."""

    adapter: str
    more: tuple[str, ...]
    output: str | None
    base: str | None
    dtype: str
    trained_on: str
    double_quant: bool | None
    compute_dtype: str | None
    block_size: str | None
    skip_modules: str | None
    into: str
    max_shard_size: str | None
    requantize: bool
    min_survival: float | None
    device: str
    with_hash: bool
    dry_run: bool
    every: bool
    overwrite: bool
    part: str | None
    is_last: bool
    push_to_hub: str | None
    stream: bool
    max_disk: str | None
    cache_dir: str | None
    ray: str | None
    private: bool
    revision: str | None
    create_pr: bool
    commit_message: str | None
    as_json: bool

    @property
    def target(self) -> dict[str, Any]:
        """How the Hub's repository is to be written to."""
        return {
            "private": self.private,
            "revision": self.revision,
            "create_pr": self.create_pr,
            "commit_message": self.commit_message,
        }


_Test = Callable[[Asked], object]

CONFLICTS: tuple[tuple[_Test, str], ...] = (
    (
        lambda asked: asked.push_to_hub is None and (asked.stream or any(asked.target.values())),
        "--stream, --private, --revision, --create-pr and --commit-message want --push-to-hub.",
    ),
    (
        lambda asked: asked.min_survival is not None and not asked.requantize,
        "--min-survival wants --requantize.",
    ),
    (
        lambda asked: asked.stream and asked.requantize,
        "--stream cannot take back what is sent if too little survives; leave out --requantize.",
    ),
    (
        lambda asked: not asked.stream and (asked.max_disk or asked.cache_dir),
        "--max-disk and --cache-dir want --stream.",
    ),
    (
        lambda asked: asked.stream and (asked.output is not None or asked.overwrite),
        "--stream keeps nothing here; leave out --output and --overwrite.",
    ),
    (lambda asked: asked.stream and asked.ray is not None, "--ray merges into a folder; leave out --stream."),
    (lambda asked: asked.stream and (asked.part or asked.is_last), "--part and --finish make a folder; leave out "
        "--stream."),
    (lambda asked: asked.part and asked.is_last, "--finish comes when all parts are there; leave out --part."),
    (
        lambda asked: asked.part and asked.push_to_hub,
        "--part publishes nothing; leave out --push-to-hub, or give it with --finish.",
    ),
    (
        lambda asked: asked.is_last and asked.dry_run,
        "--finish has no plan of its own; leave out --dry-run, or --finish.",
    ),
    (
        lambda asked: asked.ray is not None and not asked.ray.strip(),
        "--ray is empty; write auto, local, HOST:PORT or ray://HOST:PORT.",
    ),
    (
        lambda asked: asked.ray is not None and (asked.part or asked.is_last),
        "--ray divides the files itself; leave out --part and --finish.",
    ),
    (
        lambda asked: asked.every and not asked.dry_run,
        "--all wants --dry-run, whose rows it lists one by one.",
    ),
    (
        lambda asked: asked.push_to_hub is not None and asked.output is not None and is_object_address(asked.output),
        "--push-to-hub publishes what is on this machine; merge to a folder, or use '--stream' and no --output.",
    ),
)  # fmt: skip
"""Of which a test that holds is a wrong command line, and why, in the order in which they are looked at."""


def check(asked: Asked) -> None:
    """Raise click.UsageError for options that do not go together, or want another."""
    for holds, why in CONFLICTS:
        if holds(asked):
            raise click.UsageError(why)
    if not asked.stream and asked.output is None and not asked.dry_run:
        hint = ", or '--stream' to keep no copy here" if asked.push_to_hub else ""
        raise click.UsageError(f"Missing option '--output' (or ask for the plan alone with '--dry-run'{hint}).")
