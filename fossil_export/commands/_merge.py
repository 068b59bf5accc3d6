"""`fossil-export merge`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from fossil_export._console import print_warnings, progress
from fossil_export._extras import need, of_base, of_device, of_names, require
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.commands import _training as training
from fossil_export.commands._command import Command, option
from fossil_export.commands._merge_asked import Asked, check
from fossil_export.commands._shared import (
    adapter_argument,
    base_option,
    expect,
    json_option,
    numbered,
    publishing,
    show,
    weighted,
)
from fossil_export.commands._types import DEVICE, FOLDER, SIZE, Spelled
from fossil_export.tables import (
    print_moves,
    print_part,
    print_part_plan,
    print_plan,
    print_push_too,
    print_result,
    print_streamed,
)

DTYPES = ("auto", *(name for name in BY_TORCH_NAME if name != "float64"))
# Weights that are not stored as float64 are merged in float32; wider ones would hold no more.

RESULT, LOOK, PARTS, HUB = "Result", "Before and after", "Parts and clusters", "Publishing"

EXAMPLES = (
    "fossil-export merge my-adapter --dry-run",
    "fossil-export merge my-adapter --output my-model",
    "fossil-export merge my-qlora --trained-on nf4 --output my-model",
    "fossil-export merge user/my-adapter --push-to-hub user/my-model --stream",
)


@click.command(cls=Command, short_help="Merge an adapter into its base: a plain model folder.", examples=EXAMPLES)
@adapter_argument
@option(
    "-o",
    "--output",
    group=RESULT,
    metavar="DIR",
    type=FOLDER,
    help="The merged model: a new folder, or an address like s3://bucket/name.",
)
@base_option(RESULT)
@option(
    "--adapter",
    "more",
    group=RESULT,
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    type=FOLDER,
    help="Add this adapter, too; can be given again.",
)
@option(
    "--dtype",
    group=RESULT,
    type=Spelled(DTYPES),
    default="auto",
    show_default=True,
    help="Of the merged weights; auto: each tensor keeps its own.",
)
@option(
    "--max-shard-size",
    group=RESULT,
    metavar="SIZE",
    type=SIZE,
    help="Cut the weights into files of this size, e.g. 5GB.  [default: as the base is]",
)
@option("--overwrite", group=RESULT, is_flag=True, help="Replace a folder that an earlier merge wrote.")
@option(
    "--hash",
    "with_hash",
    group=RESULT,
    is_flag=True,
    help="Record SHA-256 of the weights files (reads them once more).",
)
@option(
    "--device",
    group=RESULT,
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    type=DEVICE,
    help="Where to compute: cpu, cuda (or gpu), cuda:1.",
)
@option("--dry-run", group=RESULT, is_flag=True, help="Print the plan and write nothing.")
@option(
    "--all", "every", group=RESULT, is_flag=True, help="With --dry-run: a row for every tensor, not for every kind."
)
@training.trained_on
@training.double_quant
@training.compute_dtype
@training.block_size
@training.skip_modules
@training.into
@option(
    "--requantize",
    group=training.QUANTIZED,
    is_flag=True,
    help="Keep the format of a quantized base.  [default: full precision]",
)
@option(
    "--min-survival",
    group=training.QUANTIZED,
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="With --requantize: refuse a result that keeps less of the update.  [default: 0.5]",
)
@option(
    "--part",
    group=PARTS,
    metavar="N/M",
    help="Write part N of M, e.g. 3/16. Others may run at the same time, on machines that share DIR.",
)
@option("--finish", "is_last", group=PARTS, is_flag=True, help="Put the parts together, when all are there.")
@option(
    "--ray",
    group=PARTS,
    metavar="ADDRESS",
    help="Merge on a Ray cluster: auto (the one that runs, else one on this machine), local, HOST:PORT or "
    "ray://HOST:PORT. All nodes must see --output.",
)
@option("--push-to-hub", group=HUB, metavar="REPO_ID", help="Publish the merged model on the Hub.")
@option("--stream", group=HUB, is_flag=True, help="File by file, with about one file on the disk and no --output.")
@option("--max-disk", group=HUB, metavar="SIZE", type=SIZE, help="With --stream: use no more than this, e.g. 20GB.")
@option(
    "--cache-dir",
    group=HUB,
    metavar="DIR",
    type=FOLDER,
    help="With --stream: where the current file lies.  [default: ~/.cache/fossil-export]",
)
@publishing(HUB)
@json_option
def merge(**given: Any) -> None:
    """Merge ADAPTER into its base model: a plain checkpoint that every runtime loads.

    ADAPTER is a folder that PEFT saved (FOSSIL, LoRA, DoRA, …), or the id of one on the Hub: user/repo[@revision] or
    hf://user/repo/folder. The base is streamed, never loaded; it and the adapter are only read.

    A merge that was interrupted goes on where it was if the same command runs again. To divide it among processes or
    machines, run it with --part 1/16 to --part 16/16, in any order, then with --finish.

    ADAPTER=0.7 adds 0.7 times its update. Of several adapters (--adapter) the updates are added in their order, as PEFT
    does with all of them active. Other ways to combine (TIES, DARE, SLERP, …) are mergekit's: merge each adapter alone,
    and give it the merged models.
    """
    asked = Asked(**given)
    check(asked)
    expect(
        *of_device(asked.device),
        *([need("ray")] if asked.ray is not None else []),
        *of_names(asked.adapter, *asked.more, asked.output),
        *of_base(asked.base),
    )
    if asked.stream:
        _stream(asked)
    else:
        _merge(asked)


def _named(asked: Asked) -> list[str | tuple[str, float]]:
    return [weighted(one) for one in (asked.adapter, *asked.more)]


def _settings(asked: Asked) -> dict[str, Any]:
    """The arguments that a plan takes, here and streamed."""
    how = (asked.double_quant, asked.compute_dtype, asked.block_size, asked.skip_modules)
    return {
        "dtype": asked.dtype,
        "max_shard_size": asked.max_shard_size,
        "trained_on": training.settings(asked.trained_on, *how),
        "into": asked.into,
    }


def _stream(asked: Asked) -> None:
    """To the Hub, and no copy here."""
    assert asked.push_to_hub is not None
    adapters, settings = _named(asked), _settings(asked)
    from fossil_export.publishing import plan_stream, run_stream
    from fossil_export.publishing._target import Target

    Target(asked.push_to_hub, asked.revision, asked.create_pr)  # a wrong name shows now
    moves = plan_stream(adapters, asked.base, max_disk=asked.max_disk, **settings, progress=progress())
    if asked.dry_run:
        show(moves.to_dict() if asked.as_json else None, print_moves, moves)
        print_warnings(moves.merge.warnings)
        return
    require(f"--device {asked.device}", *of_device(asked.device))
    options: dict[str, Any] = {"device": asked.device, "hash": asked.with_hash, "cache_dir": asked.cache_dir}
    streamed = run_stream(moves, asked.push_to_hub, progress=progress(), **options, **asked.target)
    show(streamed.to_dict() if asked.as_json else None, print_streamed, streamed)
    print_warnings(streamed.push.warnings)


def _merge(asked: Asked) -> None:
    """To a folder, whole or a part of it, here or on a cluster; and then to the Hub."""
    adapters, settings = _named(asked), _settings(asked)
    wanted = None if asked.part is None else numbered(asked.part)
    if asked.push_to_hub is not None:
        from fossil_export.publishing._foreseen import foresee_merged
        from fossil_export.publishing._target import Target

        place = Target(asked.push_to_hub, asked.revision, asked.create_pr)  # a wrong name shows now
        exists = not asked.dry_run and place.foresee()  # and what else will be refused, before hours of work
    from fossil_export.merging import finish_merge, merge_part, plan_merge, run_merge
    from fossil_export.merging._parts import plan_part
    from fossil_export.merging._requantize import LEAST

    settings["requantize"] = asked.requantize
    settings["min_survival"] = LEAST if asked.min_survival is None else asked.min_survival
    if asked.ray is not None:
        from fossil_export.clusters._connection import check_ray

        check_ray()  # before a plan, which may take seconds
    plan = plan_merge(adapters, asked.base, **settings, progress=progress())
    if asked.dry_run or asked.output is None:
        if wanted is not None:
            chosen = plan_part(plan, wanted)
            show(chosen.to_dict() if asked.as_json else None, print_part_plan, chosen)
        else:
            show(plan.to_dict() if asked.as_json else None, partial(print_plan, every=asked.every), plan)
        print_warnings(plan.warnings)
        return
    require(f"--device {asked.device}", *(of_device(asked.device) if asked.ray is None else ()))
    if asked.push_to_hub is not None:
        foresee_merged(plan, place, exists)
    options: dict[str, Any] = {"device": asked.device, "overwrite": asked.overwrite, "hash": asked.with_hash}
    options["progress"] = progress()
    if wanted is not None:
        done = merge_part(plan, asked.output, wanted, **options)
        show(done.to_dict() if asked.as_json else None, print_part, done)
        print_warnings(done.warnings)
        return
    cluster = published = None
    if asked.ray is None:
        result = (finish_merge if asked.is_last else run_merge)(plan, asked.output, **options)
    else:
        from fossil_export.clusters._asked import asked_for
        from fossil_export.clusters._merge import run_on_ray

        told = asked_for(adapters, asked.base, None, settings)
        result, cluster = run_on_ray(plan, told, asked.output, address=asked.ray, **options)
    if asked.push_to_hub is not None:
        from fossil_export.publishing._push import push_merged

        published = push_merged(result, asked.push_to_hub, progress=progress(), **asked.target)
    more_of_it = {"push": published.to_dict()} if published is not None else {}
    more_of_it |= {"ray": cluster.to_dict()} if cluster is not None else {}
    show(result.to_dict() | more_of_it if asked.as_json else None, print_result, result)
    if published is not None and not asked.as_json:
        show(None, print_push_too, published)
    print_warnings(result.warnings + (published.warnings if published is not None else ()))
