"""`verify --report`: the verdict and every figure behind it as one HTML page that needs nothing else.

The page is well-formed XML too, has no script, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fossil_export.verifying._bounds import FACTOR, FLOOR
from fossil_export.verifying._markup import number, share_text, text
from fossil_export.verifying._plots import heat_map, module_plot
from fossil_export.version import __version__

if TYPE_CHECKING:
    from fossil_export.verifying._forward import ForwardCheck
    from fossil_export.verifying._verdict import Verification
    from fossil_export.verifying._weights import TensorCheck

REASONS, WRONG = 20, 50
"""Further reasons and wrong tensors that are listed; of the rest only the number."""

AS_RUN = (
    " The artifact is judged with products in full precision. As it runs, ONNX Runtime rounds their inputs to 8 bits."
)

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1c2127; --quiet: #5c646d; --rule: #dedad3;
  --soft: #f1efea; --good: #17713f; --bad: #b02318; --artifact: #1c57a0; --trainer: #bd660a; --band: #1c57a01c; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e2e5e9; --quiet: #9aa3ad;
  --rule: #30363d; --soft: #1e2227; --good: #62cb90; --bad: #ff8d80; --artifact: #8cc3fa;
  --trainer: #c9781a; --band: #8cc3fa26; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 948px; margin: 0 auto; padding: 36px 24px 48px; }
h1 { font-size: 40px; line-height: 1.15; margin: 4px 0 10px; letter-spacing: -0.015em; text-wrap: balance; }
h2 { font-size: 19px; margin: 40px 0 6px; padding-top: 18px; border-top: 1px solid var(--rule); }
p, ul { margin: 6px 0; } ul { padding-left: 20px; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--good); padding-left: 20px; } .verdict h1 { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .bad h1, .wrong { color: var(--bad); }
.reason { font-size: 18px; overflow-wrap: anywhere; }
.verdict .quiet { margin-top: 12px; font-size: 14px; } li { overflow-wrap: anywhere; }
.quiet, figcaption, th, dt { color: var(--quiet); } figcaption { font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 14px 0; }
.tiles div { background: var(--soft); border-radius: 6px; padding: 10px 14px; }
.tiles dt { font-size: 13px; } .tiles dd { margin: 0; font-size: 23px; line-height: 1.3; }
dd small { display: block; font-size: 13px; color: var(--quiet); }
figure { margin: 10px 0 0; }
.scroll { overflow-x: auto; background: linear-gradient(90deg, var(--page) 30%, transparent) 0 0 / 40px 100% local,
  linear-gradient(270deg, var(--page) 30%, transparent) 100% 0 / 40px 100% local,
  linear-gradient(90deg, var(--rule), transparent) 0 0 / 14px 100% scroll,
  linear-gradient(270deg, var(--rule), transparent) 100% 0 / 14px 100% scroll; background-repeat: no-repeat; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--artifact); outline-offset: 2px; }
svg { display: block; width: 100%; height: auto; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
svg text { fill: var(--quiet); font-size: 12px; font-family: inherit; }
.grid { stroke: var(--rule); } .band { fill: var(--band); }
.hit { fill: transparent; } .hit:hover { fill: var(--band); }
.line { fill: none; stroke-linejoin: round; } .trainer { stroke: var(--trainer); stroke-width: 3; }
.artifact { stroke: var(--artifact); stroke-width: 1.4; } .dot { fill: var(--artifact); }
.first { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 4 3; } svg .named { fill: var(--bad); }
.cell:hover { stroke: var(--ink); stroke-width: 2; } .none { fill: var(--soft); stroke: var(--rule); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--quiet); margin: 8px 0; }
.legend i { display: inline-block; width: 22px; height: 0; margin-right: 7px; vertical-align: middle;
  border-top: 2px solid var(--artifact); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend .t { border-top: 4px solid var(--trainer); } .legend .b { height: 12px; border: 0; background: var(--band); }
.legend .r { width: 140px; height: 12px; border: 0; margin: 0 7px; border-radius: 2px; }
.legend .n { width: 14px; height: 12px; border: 1px solid var(--rule); background: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; font-size: 13px; } .number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; } th:last-child, td:last-child { padding-right: 0; }
summary { cursor: pointer; margin: 28px 0 8px; font-weight: 600; }
footer { margin-top: 40px; padding-top: 14px; border-top: 1px solid var(--rule); font-size: 13px; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
footer dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 22px 16px 32px; } h1 { font-size: 31px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles div:last-child { grid-column: span 2; }
  th, td { padding-right: 12px; } table { font-size: 13px; } .verdict { padding-left: 14px; } }
@media print { :root { --page: #fff; }
  main { padding: 0; max-width: none; } figure, tr, .tiles div { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll { overflow: visible; background: none; } svg { min-width: 0 !important; } }
"""


def html(result: Verification) -> str:
    """The whole page, to be stored as UTF-8."""
    title = f"{'Parity' if result.parity else 'Not the trained model'}: {result.artifact.name}"
    body = [_verdict(result)]
    if result.tensors is not None:
        body.append(_weights_figures(result.tensors))
    if result.forward is not None:
        body += [_forward_figures(result.forward), module_plot(result.forward)]
    if result.tensors is not None:
        merged = [check for check in result.tensors if check.action == "merge"]
        body += [heat_map(merged), _wrong(result.tensors), _merged(merged)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(body)}{_footer(result)}</main></body></html>\n"
    )


def _verdict(result: Verification) -> str:
    levels = [name for name, found in (("weights", result.tensors), ("forward", result.forward)) if found is not None]
    said = "The artifact is the trained model, up to rounding." if result.parity else result.problems[0]
    if result.parity and result.verdict != "parity":
        said = f"{result.verdict[0].upper()}{result.verdict[1:]}."
    ran = f"Levels that ran: {' and '.join(levels)}" if levels else "No level could run"
    return (
        f'<header class="verdict{"" if result.parity else " bad"}">'
        f"<h1>{'Parity' if result.parity else 'Not the trained model'}</h1>"
        f'<p class="reason">{text(said)}</p>{_reasons(result.problems[1:])}'
        f'<p class="quiet"><code>{text(result.artifact)}</code><br/>{ran}; {result.seconds:.1f} s. '
        f"Compared with {text(result.compared_with)}.</p></header>\n"
    )


def _reasons(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = [text(problem) for problem in problems[:REASONS]]
    items += [f"and {len(problems) - REASONS:,} more"] if len(problems) > REASONS else []
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _weights_figures(tensors: Sequence[TensorCheck]) -> str:
    merged = [check for check in tensors if check.action == "merge"]
    wrong = sum(check.problem is not None for check in tensors)
    worst = max((math.inf if math.isnan(check.worst) else check.worst for check in merged), default=0.0)
    kept, update = sum(check.kept for check in merged), sum(check.update for check in merged)
    tiles = (
        ("Tensors compared", f"{len(tensors):,}"),
        ("Merged", f"{len(merged):,}"),
        ("Wrong", f'<span class="wrong">{wrong:,}</span>' if wrong else "0"),
        ("Worst error, in steps", f"{number(worst)} <small>0.5 = exact rounding</small>"),
        ("Update that survived", share_text(kept / update if update else None)),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<section><h2>Weights</h2><dl class="tiles">{items}</dl></section>\n'


def _forward_figures(found: ForwardCheck) -> str:
    def error(name: str, of: str, noise: float | None = None) -> list[str]:
        trainer = getattr(found.trainer, of)
        allowed = number(FACTOR * trainer + FLOOR + noise) if noise is not None else ""
        return [name, number(trainer), number(getattr(found.artifact, of)), allowed, *as_run(of, number)]

    def as_run(of: str, shown: Callable[[float], str]) -> list[str]:
        return [shown(getattr(found.as_run, of))] if found.as_run is not None else []

    trainer, artifact = found.trainer, found.artifact
    same = f"{found.same_continuations} of {found.continuations}" if found.continuations else "none made"
    rows = [
        error("Relative error, median position", "relative_error", found.noise),
        error("Relative error, worst tenth", "worst_tenth", 2 * found.noise),
        error("KL divergence, nats", "kl"),
        ["Same likeliest token", share_text(trainer.top1), share_text(artifact.top1), "", *as_run("top1", share_text)],
        # The continuations are of the artifact as it runs.
        ["Same continuation as the trainer", "", *([same, ""] if found.as_run is None else ["", "", same])],
    ]
    heads = ["Distance from the truth", "Trainer", "Artifact", "Allowed", *as_run("kl", lambda _: "As it runs")]
    table = _table(heads, rows, numbers=(1, 2, 3, 4))
    note = "" if found.as_run is None else AS_RUN
    return (
        f"<section><h2>Logits</h2><p class='quiet'>{found.asked} on {text(found.device)}. The truth is the "
        f"unmerged model in {text(found.truth_dtype)}, the trainer the same in {text(found.trainer_dtype)}.{note}</p>"
        f"{table}</section>\n"
    )


def _wrong(tensors: Sequence[TensorCheck]) -> str:
    wrong = [check for check in tensors if check.problem is not None]
    if not wrong:
        return ""
    rows = [[f"<code>{text(check.name)}</code>", check.action, text(check.problem)] for check in wrong[:WRONG]]
    more = f"<p>and {len(wrong) - WRONG:,} more</p>" if len(wrong) > WRONG else ""
    table = _table(["Tensor", "Action", "What is wrong"], rows)
    return f"<section><h2>Wrong tensors</h2>{table}{more}</section>\n"


def _merged(merged: Sequence[TensorCheck]) -> str:
    if not merged:
        return ""
    rows = [
        [f"<code>{text(check.name)}</code>", number(check.worst), f"{check.off:,}", share_text(check.survived)]
        for check in merged
    ]
    table = _table(["Tensor", "Worst error, steps", "Elements off", "Survived"], rows, numbers=(1, 2, 3))
    return f"<details><summary>Every merged tensor ({len(merged):,})</summary>{table}</details>\n"


def _footer(result: Verification) -> str:
    from fossil_export.verifying._verdict import versions

    adapters = [
        f"{adapter.path} ({adapter.variant}, rank {adapter.rank}"
        + (")" if result.added.is_plain else f", at weight {weight:g})")
        for adapter, weight in result.added
    ]
    facts = {
        "Artifact": result.artifact,
        "Adapter" if len(adapters) == 1 else "Adapters": " + ".join(adapters),
        "Base": result.base_name,
        "Device": result.device,
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "Made by": f"fossil-export {__version__}",
    }
    return (
        f"<footer><dl>{''.join(f'<dt>{name}</dt><dd>{text(fact)}</dd>' for name, fact in facts.items())}</dl></footer>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """`rows` are HTML already; the columns `numbers` are set to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = (scope + (' class="number"' if index in numbers else "") for index in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'
