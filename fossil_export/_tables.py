"""The commands' results as short tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fossil_export._console import print_pairs, print_table, readable_bytes
from fossil_export._grouping import Group, grouped
from fossil_export.errors import listed

if TYPE_CHECKING:
    from fossil_export._inspection import Inspection
    from fossil_export.adapters import Trained
    from fossil_export.converting._conversion import Conversion
    from fossil_export.merging import MergePlan, MergeResult
    from fossil_export.onnx._export import OnnxResult
    from fossil_export.onnx._plan import OnnxPlan
    from fossil_export.publishing import PushPlan, PushResult, StreamPlan, StreamResult
    from fossil_export.verifying._verdict import Verification


GROUPS = 60
"""Kinds of rows that a table shows; more are told by their number."""


def print_export(result: OnnxResult) -> None:
    made = "brought" if result.runtime == "onnx" else f"{result.runtime}, {result.precision}"
    pairs = [("mode", result.mode), ("graph", f"{result.graph.name} ({made})")]
    pairs += [("weights", f"{result.targets} with shards"), ("folder", readable_bytes(result.nbytes))]
    pairs += [("adapter", str(result.adapter_file))] if result.adapter_file else []
    print_pairs([*pairs, ("time", f"{result.seconds:.1f} s"), ("model", str(result.output))])


def print_onnx_plan(plan: OnnxPlan, every: bool = False) -> None:
    """The weights of the graph that get trained tensors, or the modules if there is no graph yet, by kind or for
    `every` one, and the summary."""
    from fossil_export.onnx.modes import MODES

    if plan.places is not None:
        header: tuple[str, ...] = ("weight of the graph", "dtype", "out x in", "modules")
        rows: list[tuple[str, ...]] = [
            (
                place.label,
                place.dtype if place.bits is None else f"{place.bits} bits",
                f"{place.outputs}x{place.inputs}",
                ", ".join(dict.fromkeys(piece.module.rpartition(".")[2] for piece in place.pieces)),
            )
            for place in plan.places
        ]
    else:
        header = ("module", "base tensor", "out x in")
        rows = [(module, t.name, "x".join(map(str, t.shape))) for module, t in plan.merge.modules.items()]
    _print_grouped(header, rows, every)
    click.echo()
    merge, mode = plan.merge, MODES[plan.mode]
    adapter = merge.adapter
    what = "the merged model" if mode.merges else "the base"
    made = f"to be made by {plan.runtime} from {what}, {plan.precision}, for {plan.device}"
    print_pairs(
        [
            ("adapter", f"{_at(adapter.name, adapter.revision)} ({adapter.variant}, r={adapter.rank})"),
            ("base", _at(merge.base_name, merge.base_revision)),
            ("mode", f"{mode.name}: {mode.help}"),
            ("graph", made if plan.graph is None else str(plan.graph)),
            *([("places", "found when the base is here")] if plan.graph is not None and plan.places is None else []),
            ("trained", f"{len(rows)} {'modules' if plan.places is None else 'weights of the graph'}"),
            ("others", ", ".join(plan.companions) or "none"),
            ("size", f"about {readable_bytes(plan.nbytes)}"),
        ]
    )


def print_conversion(result: Conversion) -> None:
    pairs = [("written", f"{result.output} ({readable_bytes(result.nbytes)})")]
    for name, value in result.details.items():
        if not isinstance(value, dict):  # figures by module are for --json
            pairs.append((name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    print_pairs([*pairs, ("time", f"{result.seconds:.1f} s")])


def print_push(result: PushResult) -> None:
    print_pairs(_push_pairs(result))


def _push_pairs(result: PushResult) -> list[tuple[str, str]]:
    pairs = [
        ("published", result.url if result.changed else f"{result.url} (holds just this already)"),
        ("commit", result.commit[:12] + (f" on {result.revision}" if result.revision != "main" else "")),
        ("files", f"{len(result.files)}, {readable_bytes(result.nbytes)}"),
    ]
    if result.left_behind:
        pairs.append(("left behind", listed(list(result.left_behind))))
    return [*pairs, ("time", f"{result.seconds:.1f} s")]


def print_push_plan(plan: PushPlan) -> None:
    """What a push would send, where to, and what the card would say."""
    state = {True: "", False: ", a new repository" + ", private" * plan.private, None: ", not looked at"}
    branch = f", on {plan.revision}" if plan.revision else ""
    print_table(("file", "bytes"), [*((name, f"{size:,}") for name, size in plan.files.items()), ("README.md", "-")])
    click.echo()
    pairs = [
        ("kind", plan.kind),
        ("goes to", plan.repo_id + state[plan.exists]),
        ("commit", plan.title + branch + ", in a pull request" * plan.create_pr),
        ("files", f"{len(plan.files) + 1}, {readable_bytes(plan.nbytes)} and the card"),
        ("left behind", listed(list(plan.left_behind)) or "nothing"),
    ]
    pairs += [("removed", listed(list(plan.removed)))] if plan.removed else []
    for key in ("base_model", "base_model_relation", "license", "pipeline_tag", "library_name", "tags"):
        value = plan.card.get(key)
        pairs += [(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))] if value else []
    pairs += [("not checked", line) for line in plan.unchecked]
    print_pairs(pairs)


def print_streamed(result: StreamResult) -> None:
    from fossil_export.merging._survival import Survival

    plan = result.plan
    kept = sum(result.survival.values(), Survival()).survived
    pairs = [
        ("merged", f"{len(result.survival)} of {len(plan.merge.tensors)} tensors"),
        ("update kept", "-" if kept is None else f"{kept:.1%} (sampled rows)"),
        ("copied there", listed(list(result.copied)) or "nothing"),
        ("disk", f"{readable_bytes(plan.disk)} at most"),
    ]
    if result.resumed:
        pairs.append(("taken up", f"{result.resumed} files were uploaded before"))
    print_pairs([*pairs, *_push_pairs(result.push)])


def print_moves(plan: StreamPlan) -> None:
    """What a streamed merge would do with each file."""
    print_plan_summary(plan.merge)
    words = {
        "copy": "copied on the Hub",
        "send": "sent as it is",
        "change": "fetched, merged, sent",
        "write": "merged, sent",
    }
    click.echo()
    print_table(
        ("file", "bytes", "way", "on the disk"),
        [
            (move.file.name, f"{move.file.size:,}", words[move.way], f"{move.disk:,}" if move.disk else "-")
            for move in plan.moves
        ],
    )
    click.echo()
    print_pairs(
        [
            ("to fetch", readable_bytes(plan.fetched)),
            ("to send", readable_bytes(plan.nbytes("send", "change", "write"))),
            ("copied there", readable_bytes(plan.nbytes("copy"))),
            ("disk", f"{readable_bytes(plan.disk)} at most"),
        ]
    )


def print_verification(result: Verification) -> None:
    pairs = [("verdict", "parity" if result.parity else "NOT the trained model")]
    pairs.append(("compared with", result.compared_with))
    if result.tensors is not None:
        merged = [check for check in result.tensors if check.action == "merge"]
        wrong = sum(check.problem is not None for check in result.tensors)
        worst = max((check.worst for check in merged), default=0.0)
        pairs.append(("weights", f"{len(result.tensors)} tensors, {len(merged)} merged, {wrong} wrong"))
        pairs.append(("worst error", f"{worst:.4f} steps of the dtype (0.5 is exact rounding)"))
    if result.forward is not None:
        forward = result.forward
        for name, found in (("trainer", forward.trainer), ("artifact", forward.artifact)):
            text = f"{found.relative_error:.2e} from the truth, KL {found.kl:.1e}, top-1 {found.top1:.1%}"
            pairs.append((name, f"{text} ({forward.trainer_dtype})" if name == "trainer" else text))
        same = f"{forward.same_continuations} of {forward.continuations}"
        pairs.append(("continuations", f"{same} the same ({forward.prompts} prompts, truth in {forward.truth_dtype})"))
    pairs += [("device", result.device), ("time", f"{result.seconds:.1f} s")]
    print_pairs(pairs)


def print_plan(plan: MergePlan, every: bool = False) -> None:
    """What is done to the tensors that are not simply copied, by kind of tensor or for `every` one, and the summary."""
    rows = [
        (
            tensor.action,
            tensor.name,
            tensor.dtype,
            "x".join(map(str, tensor.shape)),
            " + ".join(change.trained.label for change in tensor.changes) or tensor.source.name,
        )
        for tensor in plan.tensors
        if tensor.action in ("merge", "replace", "add")
    ]
    _print_grouped(("action", "tensor", "dtype", "shape", "from"), rows, every)
    click.echo()
    print_plan_summary(plan)


def _print_grouped(header: Sequence[str], rows: Sequence[Sequence[str]], every: bool) -> None:
    """Rows of one kind as one with their number, unless `every` row is asked for."""
    if every:
        print_table(header, rows)
        return
    groups = grouped(rows)
    shown = [(*group.cells, str(len(group))) for group in groups[:GROUPS]]
    print_table((*header, "×"), shown)
    if len(groups) > GROUPS:
        click.echo(f"and {len(groups) - GROUPS} more kinds; --all shows every row")


def print_plan_summary(plan: MergePlan) -> None:
    from fossil_export.merging._plan import ACTIONS

    print_pairs(
        [
            *(
                ("adapter", f"{_at(adapter.name, adapter.revision)} ({adapter.variant}, r={adapter.rank})")
                for adapter in plan.adapters
            ),
            ("base", _at(plan.base_name, plan.base_revision)),
            ("tensors", ", ".join(f"{action} {count}" for action in ACTIONS if (count := plan.count(action)))),
            ("files", f"{len(plan.files)} of weights, {readable_bytes(plan.nbytes)}; {len(plan.companions)} others"),
            *(
                [("config.json", ", ".join(f"{k} = {v}" for k, v in plan.config_edits.items()))]
                if plan.config_edits
                else []
            ),
            *([("left behind", ", ".join(plan.left_behind))] if plan.left_behind else []),
            *(("undecided", f"{pair[1]} stays tied to {pair[0]} if they are equal") for pair in plan.undecided if pair),
        ]
    )


def _trained_as(plan: MergePlan) -> str:
    return "; ".join(f"{adapter.variant}, r={adapter.rank}" for adapter in plan.adapters)


def print_result(result: MergeResult) -> None:
    plan = result.plan
    total = result.to_dict()["survival"]["survived"]
    print_pairs(
        [
            (
                "merged",
                f"{plan.count('merge')} of {len(plan.tensors)} tensors ({_trained_as(plan)})",
            ),
            ("update kept", "-" if total is None else f"{total:.1%} (sampled rows)"),
            ("written", readable_bytes(plan.nbytes)),
            ("time", f"{result.seconds:.1f} s"),
            ("peak memory", readable_bytes(result.peak_memory)),
            ("model", str(result.output)),
        ]
    )


def print_inspection(found: Inspection, every: bool = False) -> None:
    """What was found, by kind of module or for `every` one; the summary comes last."""
    adapter = found.adapter
    touched = found.plan.modules if found.plan is not None else {}
    rows = [
        (module, _shapes(trained), touched[module].name if module in touched else "-")
        for module, trained in adapter.trained.items()
    ]
    norms = [found.norms.get(module) for module in adapter.trained]
    groups = [Group(row, (place,)) for place, row in enumerate(rows)] if every else grouped(rows)
    shown = groups if every else groups[:GROUPS]
    table = [(*g.cells, _span([norms[place] for place in g.members]), str(len(g))) for g in shown]
    print_table(("module", "shard", "base tensor", "norm", "×"), table)
    if len(shown) < len(groups):
        click.echo(f"and {len(groups) - len(shown)} more kinds; --all shows every module")
    click.echo()
    _print_adapter(found)


def _shapes(trained: Trained) -> str:
    return " + ".join("x".join(map(str, shape)) for shape in trained.shapes.values())


def _span(norms: Sequence[float | None]) -> str:
    known = [norm for norm in norms if norm is not None]
    if not known:
        return "-"
    least, most = f"{min(known):.4g}", f"{max(known):.4g}"
    return least if least == most else f"{least}–{most}"


def _print_adapter(found: Inspection) -> None:
    from fossil_export._inspection import dtypes

    adapter = found.adapter
    saved = ", ".join(info.name for info in adapter.saved.values())
    pairs = [
        ("adapter", f"{_at(adapter.name, adapter.revision)} ({adapter.peft_type})"),
        ("variant", adapter.variant),
        ("rank", str(adapter.rank)),
        ("modules", str(len(adapter.trained))),
        ("parameters", f"{adapter.parameters:,}"),
        ("dtype", ", ".join(dtypes(adapter))),
        ("also holds", saved or "nothing"),
        ("base", adapter.base_model or "not named"),
        ("merge", _verdict(found)),
    ]
    if not found.norms:
        pairs.append(("norms", "not known: the values are on the Hub, and only headers were read"))
    print_pairs(pairs)


def _verdict(found: Inspection) -> str:
    if found.problems:
        return "stopped: " + "; ".join(found.problems)
    if found.plan is None:
        return "not checked: the base is not here, name it with --base"
    return (
        f"possible, touches {len(found.plan.tensors) - found.plan.count('copy')} of {len(found.plan.tensors)} tensors"
    )


def _at(name: str, revision: str | None) -> str:
    return name + (f" at {revision}" if revision else "")
