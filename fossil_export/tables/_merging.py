"""Plans of merges and what they did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fossil_export._console import echo, readable_bytes
from fossil_export.checkpoints._dtypes import TORCH_NAME
from fossil_export.errors import listed
from fossil_export.tables._exits import push_pairs
from fossil_export.tables._fitting import print_pairs, print_table
from fossil_export.tables._shared import described, named_at, print_grouped

if TYPE_CHECKING:
    from fossil_export.merging import MergePlan, MergeResult, PartResult
    from fossil_export.merging._change import Change
    from fossil_export.merging._layout import TensorPlan
    from fossil_export.merging._parts import PartPlan
    from fossil_export.merging._quantization_error import Ratio
    from fossil_export.publishing import StreamPlan, StreamResult


def print_plan(plan: MergePlan, every: bool = False) -> None:
    """What is done to the tensors that are not simply copied, by kind of tensor or for `every` one, and the summary."""
    rows = [
        (tensor.name, TORCH_NAME.get(tensor.dtype, tensor.dtype), "x".join(map(str, tensor.shape)), _change(tensor))
        for tensor in plan.tensors
        if tensor.action in ("merge", "replace", "add", "requantize") and tensor.leads
    ]
    print_grouped(("tensor", "dtype", "shape", "change"), rows, every)
    echo()
    print_plan_summary(plan)


def _change(tensor: TensorPlan) -> str:
    """What a tensor gets: "tile r=64", "0.5 × lora r=8 of lm_head", "replace: lm_head.weight"."""
    told = " + ".join(_told(change, tensor.name) for change in tensor.weight.changes)
    if tensor.action == "merge" and told:
        return told
    of = told or " + ".join(info.name for info in tensor.brought) or tensor.source.name
    return f"{tensor.action}: {of}"


def _told(change: Change, tensor: str) -> str:
    """What is added: the method, its rank, and the module if the tensor's name does not say it already."""
    trained = change.trained
    times = f"{change.weight:g} × " if change.weight != 1.0 else ""
    rank = f" r={trained.rank}" if trained.rank else ""
    module = "" if tensor.removesuffix(".weight") == trained.module else f" of {trained.module}"
    return f"{times}{trained.method}{rank}{module}"


def print_plan_summary(plan: MergePlan) -> None:
    from fossil_export.merging._plan import ACTIONS

    print_pairs(
        [
            *(
                ("adapter", f"{named_at(adapter.name, adapter.revision)} ({described(adapter)}{times})")
                for adapter, times in zip(plan.adapters, _times(plan), strict=True)
            ),
            ("base", named_at(plan.base_name, plan.base_revision) + _format(plan)),
            *_seen(plan),
            ("tensors", ", ".join(f"{action} {count}" for action in ACTIONS if (count := plan.count(action)))),
            ("files", f"{len(plan.files)} of weights, {readable_bytes(plan.nbytes)}; {len(plan.companions)} others"),
            *(
                [("config.json", ", ".join(_edit(key, value) for key, value in plan.config_edits.items()))]
                if plan.config_edits
                else []
            ),
            *([("left behind", ", ".join(plan.left_behind))] if plan.left_behind else []),
            *(("undecided", f"{pair[1]} stays tied to {pair[0]} if they are equal") for pair in plan.undecided if pair),
        ]
    )


def _format(plan: MergePlan) -> str:
    if plan.base.quantized is None:
        return ""
    return f" ({plan.base.quantized.format}, {'kept' if plan.min_survival is not None else 'dequantized'})"


def _edit(key: str, value: object) -> str:
    return f"{key} removed" if value is None else f"{key} = {value}"


def _seen(plan: MergePlan) -> list[tuple[str, str]]:
    """What training saw of the base, if it is known, and what the updates are added to."""
    if plan.trained_on is None:
        return []
    added = "the base as training saw it" if plan.into == "trained" else "the original weights"
    return [("trained on", f"{plan.seen.told}; added to {added}")]


def ratios_told(ratios: Mapping[str, Ratio]) -> str:
    """ "0.9–9.5 times the update (most in k_proj)"."""
    known = {kind: one.ratio for kind, one in ratios.items() if one.ratio is not None}
    if not known:
        return "-"
    most = max(known, key=lambda kind: known[kind])
    least, largest = f"{min(known.values()):.3g}", f"{known[most]:.3g}"
    span = largest if least == largest else f"{least}–{largest}"
    return f"moved the weights by {span} times the update{f' (most in {most})' if len(known) > 1 else ''}"


def _times(plan: MergePlan) -> list[str]:
    """The weight of each adapter, in words; nothing if there is one at weight 1."""
    if plan.weights == (1.0,):
        return [""]
    return [f", at weight {weight:g}" for weight in plan.weights]


def _trained_as(plan: MergePlan) -> str:
    pairs = zip(plan.adapters, _times(plan), strict=True)
    return " + ".join(f"{described(adapter)}{times}" for adapter, times in pairs)


def _kept_in(plan: MergePlan) -> str:
    return plan.base.quantized.format if plan.base.quantized is not None else "-"


def print_result(result: MergeResult) -> None:
    from fossil_export.merging._survival import Survival

    plan = result.plan
    total = sum(result.survival.values(), Survival()).survived
    sampled = " (sampled rows)" if plan.min_survival is None else f" (quantized again: {_kept_in(plan)})"
    print_pairs(
        [
            (
                "merged",
                f"{plan.merged} of {plan.parameters} tensors ({_trained_as(plan)})",
            ),
            *_seen(plan),
            *([("quantization", ratios_told(result.ratios))] if result.ratios else []),
            ("update kept", "-" if total is None else f"{total:.1%}{sampled}"),
            ("written", readable_bytes(plan.nbytes)),
            *([("taken up", f"{result.resumed} of {len(plan.files)} files")] if result.resumed else []),
            ("time", f"{result.seconds:.1f} s"),
            ("peak memory", readable_bytes(result.peak_memory)),
            ("model", str(result.output)),
        ]
    )


def print_part_plan(plan: PartPlan) -> None:
    """The files of a part of a merge."""
    if plan.files:
        print_table(("file", "bytes"), [(file.name, f"{file.size:,}") for file in plan.files])
        echo()
    print_pairs([("part", plan.part), ("files", f"{len(plan.files)} of weights, {readable_bytes(plan.nbytes)}")])


def print_part(result: PartResult) -> None:
    """What a part has written, and what is left for others."""
    files = listed(list(result.files), 3) or "none: there are more parts than files"
    left = len(result.missing)
    print_pairs(
        [
            ("part", result.part),
            ("files", files),
            *([("taken up", f"{result.resumed} of them were finished before")] if result.resumed else []),
            ("written", readable_bytes(result.nbytes)),
            ("time", f"{result.seconds:.1f} s"),
            ("peak memory", readable_bytes(result.peak_memory)),
            ("missing", listed(list(result.missing), 3) if left else "nothing; run the same with --finish"),
        ]
    )


def print_streamed(result: StreamResult) -> None:
    from fossil_export.merging._survival import Survival

    plan = result.plan
    kept = sum(result.survival.values(), Survival()).survived
    pairs = [
        ("merged", f"{len(result.survival)} of {len(plan.merge.tensors)} tensors"),
        ("update kept", "-" if kept is None else f"{kept:.1%} (sampled rows)"),
        ("copied on the Hub", listed(list(result.copied)) or "nothing"),
        ("disk", f"{readable_bytes(plan.disk)} at most"),
    ]
    if result.resumed:
        pairs.append(("taken up", f"{result.resumed} files were uploaded before"))
    print_pairs([*pairs, *push_pairs(result.push)])


def print_moves(plan: StreamPlan) -> None:
    """What a streamed merge would do with each file."""
    print_plan_summary(plan.merge)
    words = {
        "copy": "copied on the Hub",
        "send": "sent as it is",
        "change": "fetched, merged, sent",
        "write": "merged, sent",
    }
    echo()
    print_table(
        ("file", "bytes", "way", "on the disk"),
        [
            (move.file.name, f"{move.file.size:,}", words[move.way], f"{move.disk:,}" if move.disk else "-")
            for move in plan.moves
        ],
    )
    echo()
    print_pairs(
        [
            ("to fetch", readable_bytes(plan.fetched)),
            ("to send", readable_bytes(plan.nbytes("send", "change", "write"))),
            ("copied on the Hub", readable_bytes(plan.nbytes("copy"))),
            ("disk", f"{readable_bytes(plan.disk)} at most"),
        ]
    )
