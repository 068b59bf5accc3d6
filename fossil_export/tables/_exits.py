"""Exports, conversions, pushes and verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fossil_export._console import echo, readable_bytes
from fossil_export.errors import listed
from fossil_export.tables._fitting import print_pairs, print_table
from fossil_export.tables._shared import described, named_at, print_grouped

if TYPE_CHECKING:
    from fossil_export.converting._conversion import Conversion
    from fossil_export.onnx._export import OnnxResult
    from fossil_export.onnx._plan import OnnxPlan
    from fossil_export.publishing import PushPlan, PushResult
    from fossil_export.verifying._verdict import Verification


def print_export(result: OnnxResult) -> None:
    made = "brought" if result.runtime == "onnx" else f"{result.runtime}, {result.precision}"
    pairs = [("mode", result.mode), ("graph", f"{result.graph.name} ({made})")]
    pairs += [("weights", f"{result.targets} with what was trained"), ("folder", readable_bytes(result.nbytes))]
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
    print_grouped(header, rows, every)
    echo()
    merge, mode = plan.merge, MODES[plan.mode]
    adapter = merge.adapter
    what = "the merged model" if mode.merges else "the base"
    made = f"to be made by {plan.runtime} from {what}, {plan.precision}, for {plan.device}"
    print_pairs(
        [
            ("adapter", f"{named_at(adapter.name, adapter.revision)} ({described(adapter)})"),
            ("base", named_at(merge.base_name, merge.base_revision)),
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
            pairs.append((name.replace("_", " "), _readable(value)))
    print_pairs([*pairs, ("time", f"{result.seconds:.1f} s")])


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_push(result: PushResult) -> None:
    print_pairs(push_pairs(result))


def print_push_too(result: PushResult) -> None:
    """After another table: an empty line parts the two, whose columns are of different widths."""
    echo()
    print_push(result)


def push_pairs(result: PushResult) -> list[tuple[str, str]]:
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
    echo()
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
    pairs += [("hub", line) for line in plan.unchecked]
    print_pairs(pairs)


def print_verification(result: Verification) -> None:
    pairs = [("verdict", result.verdict)]
    pairs.append(("compared with", result.compared_with))
    if result.tensors is not None:
        merged = [check for check in result.tensors if check.action == "merge"]
        wrong = sum(check.problem is not None for check in result.tensors)
        worst = max((check.worst for check in merged), default=0.0)
        again = sum(check.action == "requantize" for check in result.tensors)
        told = f", {again} quantized again ({result.requantized})" if again else ""
        pairs.append(("weights", f"{len(result.tensors)} tensors, {len(merged)} merged{told}, {wrong} wrong"))
        if merged or not again:
            pairs.append(("worst error", f"{worst:.4f} steps of the dtype (0.5 is exact rounding)"))
        if again and result.survived is not None:
            pairs.append(("update kept", f"{result.survived:.1%}"))
    if result.forward is not None:
        forward = result.forward
        for name, found in (
            ("trainer", forward.trainer),
            ("artifact", forward.artifact),
            ("as it runs", forward.as_run),
        ):
            if found is None:
                continue
            text = f"{found.relative_error:.2e} from the truth, KL {found.kl:.1e}, top-1 {found.top1:.1%}"
            more = {"trainer": f" ({forward.trainer_dtype})"}
            if forward.as_run is not None:
                more |= {"artifact": " (products in full precision)", "as it runs": " (products of 8 bits)"}
            pairs.append((name, text + more.get(name, "")))
        same = f"{forward.same_continuations} of {forward.continuations}"
        pairs.append(("continuations", f"{same} the same ({forward.asked}, truth in {forward.truth_dtype})"))
    pairs += [("device", result.device), ("time", f"{result.seconds:.1f} s")]
    print_pairs(pairs)
