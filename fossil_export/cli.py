"""The `fossil-export` command: parse, call the API, print."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from fossil_export.console import print_json, print_warnings, progress_bar, steps
from fossil_export.errors import FossilExportError
from fossil_export.tables import (
    print_conversion,
    print_export,
    print_inspection,
    print_plan,
    print_result,
    print_verification,
)
from fossil_export.version import __version__

BASE_HELP = "Base model: a folder or a safetensors file.  [default: the one the adapter names]"


class _Group(click.Group):
    """Turns the package's errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FossilExportError as problem:
            if ctx.params.get("debug"):
                raise
            _fail(ctx, str(problem))
        except OSError as problem:  # what no part of the package expected of a file
            if ctx.params.get("debug"):
                raise
            name = f"{problem.filename}: " if problem.filename else ""
            _fail(ctx, f"{name}{problem.strerror or problem}; check that path and its permissions")


def _fail(ctx: click.Context, message: str) -> None:
    click.echo(click.style("error: ", fg="red") + message.replace("\n", " "), err=True)
    ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fossil-export")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Take a model fine-tuned with FOSSIL (Bone, DiSHA, MiSS) to where it is used."""
    # `kill` must leave no half-written folder behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@main.command()
@click.argument("adapter")
@click.option("-o", "--output", metavar="DIR", help="Folder of the merged model; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the result; auto: each tensor keeps its own.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Cut the weights anew, e.g. 5GB.  [default: the base's files]")
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1."
)
@click.option("--hash", "with_hash", is_flag=True, help="Record SHA-256 of all weights files (reads them once more).")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier merge wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(
    adapter: str,
    output: str | None,
    base: str | None,
    dtype: str,
    max_shard_size: str | None,
    device: str,
    with_hash: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTER into its base model: a plain checkpoint that every runtime loads.

    ADAPTER is a folder that PEFT saved (MISS or BONE). The base is streamed, never loaded; it and the
    adapter are only read.
    """
    from fossil_export.merging import plan_merge
    from fossil_export.merging.api import run_plan

    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' (or ask for the plan alone with '--dry-run').")
    plan = plan_merge(adapter, base, dtype=dtype, max_shard_size=max_shard_size)
    if dry_run or output is None:
        if as_json:
            print_json(plan.to_dict())
        else:
            print_plan(plan)
        print_warnings(plan.warnings)
        return
    with progress_bar(plan.nbytes, "merging") as progress:
        result = run_plan(plan, output, device=device, overwrite=overwrite, hash=with_hash, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        print_result(result)
    print_warnings(result.warnings)


@main.command()
@click.argument("adapter")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(adapter: str, base: str | None, as_json: bool) -> None:
    """Show what ADAPTER holds, which base tensors it touches and what would stop a merge.

    Exits with 1 when something would.
    """
    from fossil_export.inspection import inspect as look

    found = look(adapter, base)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)
    if found.plan is not None:
        print_warnings(found.plan.warnings)
    if found.problems:
        sys.exit(1)


@main.command()
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

    ARTIFACT is a folder that `merge`, `onnx` or `convert --to lora` wrote. Exits with 0 for parity and with 1
    otherwise, with the first reason on one line. Writes fossil_parity.json into the folder.
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


@main.command()
@click.argument("adapter")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder of the ONNX model; must not exist yet.")
@click.option("--base", metavar="BASE", help=BASE_HELP)
@click.option(
    "--mode",
    type=click.Choice(["merged", "tiled", "fused", "swappable"]),
    default="merged",
    show_default=True,
    help="merged: plain graph; tiled: base weights shared, sum folded at load; fused: branches with the shards "
    "inside; swappable: adapters loaded while the session runs.",
)
@click.option(
    "--runtime",
    type=click.Choice(["genai", "torch"]),
    help="Who makes the graph.  [default: genai for generative models, else torch]",
)
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int4"]), help="Of the graph's weights.  [default: fp32]"
)
@click.option("--onnx", "graph", metavar="FILE.onnx", help="Use this graph of the base instead of making one.")
@click.option("--copy-data", is_flag=True, help="With --onnx: copy the weights' file instead of sharing it.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="What the graph is made for.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier export wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def onnx(
    adapter: str,
    output: str,
    base: str | None,
    mode: str,
    runtime: str | None,
    precision: str | None,
    graph: str | None,
    copy_data: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER and its base as an ONNX folder that ONNX Runtime or GenAI runs.

    The graph is made from the base, or is one you have (--onnx). More adapters for a swappable folder are
    made by `convert --to onnx-adapter`; `verify` runs the folder against the trained model.
    """
    from fossil_export.onnx.api import export_onnx

    with steps() as progress:
        result = export_onnx(
            adapter,
            output,
            base=base,
            mode=mode,
            runtime=runtime,
            precision=precision,
            onnx=graph,
            copy_data=copy_data,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_export(result)
    print_warnings(result.warnings)


@main.command()
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
    """Write ADAPTER in another format. The model itself is not loaded."""
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


def _weights_size(artifact: str) -> int:
    from pathlib import Path

    return sum(path.stat().st_size for path in Path(artifact).glob("*.safetensors") if path.is_file())
