"""`fossil-export merge`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from fossil_export._answers import BLOCK_SIZES, INTO, TRAINED_ON
from fossil_export._console import print_warnings, progress
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.commands._shared import BASE_HELP, numbered, publishing, show, weighted
from fossil_export.storage.fsspec._addresses import is_object_address
from fossil_export.tables import (
    print_moves,
    print_part,
    print_part_plan,
    print_plan,
    print_push,
    print_result,
    print_streamed,
)

DTYPES = ("auto", *(name for name in BY_TORCH_NAME if name != "float64"))
# Weights that are not stored as float64 are merged in float32; wider ones would hold no more.


@click.command()
@click.argument("adapter")
@click.option(
    "--adapter",
    "more",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="Add this one too, after the first; may be given again.",
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Folder of the merged model, or its address, e.g. s3://bucket/name; must not exist yet.",
)
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Of the result; auto: each tensor keeps its own.",
)
@click.option(
    "--trained-on",
    type=click.Choice(TRAINED_ON),
    default="auto",
    show_default=True,
    help="What the base was quantized to while the adapter was trained (QLoRA); auto: what its files say.",
)
@click.option(
    "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
    "double_quant",
    default=None,
    help="With --trained-on nf4 or fp4: were the scales quantized, too?  [default: what the adapter's files say]",
)
@click.option(
    "--bnb-4bit-compute-dtype",
    "compute_dtype",
    type=click.Choice(DTYPES[1:]),
    help="With --trained-on: the dtype that it computed in; one of 16 bits is also what the model was loaded in.  "
    "[default: what the adapter's files say, or the base's]",
)
@click.option(
    "--bnb-4bit-blocksize",
    "block_size",
    type=click.Choice(BLOCK_SIZES),
    help="With --trained-on nf4 or fp4.  [default: 64]",
)
@click.option(
    "--llm-int8-skip-modules",
    "skip_modules",
    metavar="NAMES",
    help="With --trained-on: modules that stayed as they are, e.g. lm_head,router.  [default: the head, what is tied]",
)
@click.option(
    "--into",
    type=click.Choice(INTO),
    default="trained",
    show_default=True,
    help="Of a base that training quantized: add the updates to it as training saw it, or to its original weights.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Cut the weights anew, e.g. 5GB.  [default: the base's files]")
@click.option("--requantize", is_flag=True, help="Keep a quantized base's format.  [default: full precision]")
@click.option(
    "--min-survival",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="With --requantize: of the update, what must be left.  [default: 0.5]",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1."
)
@click.option("--hash", "with_hash", is_flag=True, help="Record SHA-256 of all weights files (reads them once more).")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--all", "every", is_flag=True, help="With --dry-run: a row for every tensor, not for every kind.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier merge wrote.")
@click.option(
    "--part",
    metavar="N/M",
    help="Write one of M parts of the merge, e.g. 3/16; others may run at the same time, on machines that share DIR.",
)
@click.option("--finish", "is_last", is_flag=True, help="Publish DIR from its parts, which are all there.")
@click.option("--push-to-hub", metavar="REPO_ID", help="Publish the merged model there.")
@click.option(
    "--stream", is_flag=True, help="With --push-to-hub: file by file, with about one file on the disk and no --output."
)
@click.option("--max-disk", metavar="SIZE", help="With --stream: never use more than this, e.g. 20GB.")
@click.option(
    "--cache-dir", metavar="DIR", help="With --stream: where the file at hand lies.  [default: ~/.cache/fossil-export]"
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Merge on a Ray cluster, a task a file: HOST:PORT, ray://HOST:PORT, auto (the one that runs, or else one on "
    "this machine) or local. All nodes must see --output.",
)
@publishing
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(
    adapter: str,
    more: tuple[str, ...],
    output: str | None,
    base: str | None,
    dtype: str,
    trained_on: str,
    double_quant: bool | None,
    compute_dtype: str | None,
    block_size: str | None,
    skip_modules: str | None,
    into: str,
    max_shard_size: str | None,
    requantize: bool,
    min_survival: float | None,
    device: str,
    with_hash: bool,
    dry_run: bool,
    every: bool,
    overwrite: bool,
    part: str | None,
    is_last: bool,
    push_to_hub: str | None,
    stream: bool,
    max_disk: str | None,
    cache_dir: str | None,
    ray: str | None,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    as_json: bool,
) -> None:
    """Merge ADAPTER into its base model: a plain checkpoint that every runtime loads.

    ADAPTER is a folder that PEFT saved (FOSSIL, LoRA, DoRA, …), or the id of one on the Hub: user/repo[@revision] or
    hf://user/repo/folder. The base is streamed, never loaded; it and the adapter are only read.

    A merge that was interrupted goes on where it was if the same command runs again. To divide it among processes or
    machines, run it with --part 1/16 to --part 16/16, in any order, then with --finish.

    ADAPTER=0.7 adds 0.7 times its update. Of several adapters (--adapter) the updates are added in their order, as PEFT
    does with all of them active. Other ways to combine (TIES, DARE, SLERP, …) are mergekit's: merge each adapter alone,
    and give it the merged models.
    """
    target: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
    }
    hint = ", or '--stream' to keep no copy here" if push_to_hub else ""
    for wrong, why in (
        (
            push_to_hub is None and (stream or any(target.values())),
            "--stream, --private, --revision, --create-pr and --commit-message want --push-to-hub.",
        ),
        (min_survival is not None and not requantize, "--min-survival wants --requantize."),
        (
            stream and requantize,
            "--stream cannot take back what is sent if too little survives; leave out --requantize.",
        ),
        (not stream and (max_disk or cache_dir), "--max-disk and --cache-dir want --stream."),
        (
            stream and (output is not None or overwrite),
            "--stream keeps nothing here; leave out --output and --overwrite.",
        ),
        (stream and ray is not None, "--ray merges into a folder; leave out --stream."),
        (stream and (part or is_last), "--part and --finish make a folder; leave out --stream."),
        (part and is_last, "--finish comes when all parts are there; leave out --part."),
        (part and push_to_hub, "--part publishes nothing; leave out --push-to-hub, or give it with --finish."),
        (is_last and dry_run, "--finish has no plan of its own; leave out --dry-run, or --finish."),
        (ray is not None and (part or is_last), "--ray divides the files itself; leave out --part and --finish."),
        (
            push_to_hub is not None and output is not None and is_object_address(output),
            "--push-to-hub publishes what is on this machine; merge to a folder, or use '--stream' and no --output.",
        ),
        (
            not stream and output is None and not dry_run,
            f"Missing option '--output' (or ask for the plan alone with '--dry-run'{hint}).",
        ),
    ):
        if wrong:
            raise click.UsageError(why)
    adapters = [weighted(given) for given in (adapter, *more)]
    wanted = None if part is None else numbered(part)
    seen = _settings(trained_on, double_quant, compute_dtype, block_size, skip_modules)
    if push_to_hub is not None:
        from fossil_export.publishing._foreseen import foresee_merged
        from fossil_export.publishing._target import Target

        place = Target(push_to_hub, revision, create_pr)  # a wrong name shows now
        exists = not (dry_run or stream) and place.foresee()  # and what else will be refused, before hours of work
    if stream:
        assert push_to_hub is not None
        from fossil_export.publishing import plan_stream, run_stream

        moves = plan_stream(
            adapters,
            base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            max_disk=max_disk,
            trained_on=seen,
            into=into,
            progress=progress(),
        )
        if dry_run:
            show(moves.to_dict() if as_json else None, print_moves, moves)
            print_warnings(moves.merge.warnings)
            return
        streamed = run_stream(
            moves, push_to_hub, device=device, hash=with_hash, cache_dir=cache_dir, progress=progress(), **target
        )
        show(streamed.to_dict() if as_json else None, print_streamed, streamed)
        print_warnings(streamed.push.warnings)
        return
    from fossil_export.merging import finish_merge, merge_part, plan_merge, run_merge
    from fossil_export.merging._parts import plan_part
    from fossil_export.merging._requantize import LEAST

    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "trained_on": seen,
        "into": into,
        "requantize": requantize,
        "min_survival": LEAST if min_survival is None else min_survival,
    }
    if ray is not None:
        from fossil_export.clusters._connection import check_ray

        check_ray()  # before a plan, which may take seconds
    plan = plan_merge(adapters, base, **settings, progress=progress())
    if dry_run or output is None:
        if wanted is not None:
            chosen = plan_part(plan, wanted)
            show(chosen.to_dict() if as_json else None, print_part_plan, chosen)
        else:
            show(plan.to_dict() if as_json else None, partial(print_plan, every=every), plan)
        print_warnings(plan.warnings)
        return
    if push_to_hub is not None:
        foresee_merged(plan, place, exists)
    options: dict[str, Any] = {"device": device, "overwrite": overwrite, "hash": with_hash, "progress": progress()}
    if wanted is not None:
        done = merge_part(plan, output, wanted, **options)
        show(done.to_dict() if as_json else None, print_part, done)
        print_warnings(done.warnings)
        return
    cluster = None
    if ray is None:
        result = (finish_merge if is_last else run_merge)(plan, output, **options)
    else:
        from fossil_export.clusters._asked import asked_for
        from fossil_export.clusters._merge import run_on_ray

        asked = asked_for(adapters, base, None, settings)
        result, cluster = run_on_ray(plan, asked, output, address=ray, **options)
    published = None
    if push_to_hub is not None:
        from fossil_export.publishing._push import push_merged

        published = push_merged(result, push_to_hub, progress=progress(), **target)
    more_of_it = {"push": published.to_dict()} if published is not None else {}
    more_of_it |= {"ray": cluster.to_dict()} if cluster is not None else {}
    show(result.to_dict() | more_of_it if as_json else None, print_result, result)
    if published is not None and not as_json:
        print_push(published)
    print_warnings(result.warnings + (published.warnings if published is not None else ()))


def _settings(
    kind: str, double_quant: bool | None, compute_dtype: str | None, block_size: str | None, skip_modules: str | None
) -> str | dict[str, Any]:
    """The options on training as BitsAndBytesConfig has them."""
    four = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_blocksize": block_size and int(block_size)}
    both = {
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": None
        if skip_modules is None
        else [one.strip() for one in skip_modules.split(",") if one.strip()],
    }
    given = {key: value for key, value in (four | both).items() if value is not None}
    if kind in ("auto", "unquantized"):
        if given:
            raise click.UsageError("--bnb-4bit-… and --llm-int8-skip-modules want --trained-on nf4, fp4 or int8.")
        return kind
    if kind == "fp8":
        if given:
            raise click.UsageError("--trained-on fp8 takes no --bnb-4bit-… and --llm-int8-skip-modules.")
        return kind
    if kind == "int8":
        if given.keys() & four.keys():
            raise click.UsageError("--trained-on int8 has no blocks, and no double quantization.")
        return {"load_in_8bit": True, **given}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, **given}
