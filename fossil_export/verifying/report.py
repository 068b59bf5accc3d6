"""`verify --report`: the verdict and every figure behind it as one HTML page that needs nothing else.

The page is well-formed XML too, has no script, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fossil_export.verifying.forward import FACTOR, FLOOR, MODULE_FACTOR

if TYPE_CHECKING:
    from fossil_export.verifying.api import Verification
    from fossil_export.verifying.forward import ForwardCheck, ModuleError
    from fossil_export.verifying.weights import TensorCheck

REASONS, WRONG = 20, 50
"""Further reasons and wrong tensors that are listed; of the rest only the number."""

WIDTH, HEIGHT = 900, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 46
"""Of the plot and its margins, in pixels at full size."""

DECADES = 12
"""Powers of ten the error axis spans at most; what is smaller is drawn on its lower edge."""

SCALE = ((0.5, (244, 170, 48)), (0.75, (138, 152, 164)), (1.0, (31, 78, 130)))
"""Share of the update that survived and its colour: amber to blue, ever darker, so that it can be read by
the colour-blind and in a grey print."""

LAYERED = re.compile(r"^(?:(.*?)\.)?(\d+)(?:\.(.*))?$", re.DOTALL)

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1c2127; --quiet: #5c646d; --rule: #dedad3;
  --soft: #f1efea; --good: #17713f; --bad: #b02318; --artifact: #1c57a0; --trainer: #e08a1e; --band: #1c57a01c; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e2e5e9; --quiet: #9aa3ad; --rule: #30363d;
  --soft: #1e2227; --good: #62cb90; --bad: #ff8d80; --artifact: #8cc3fa; --trainer: #c9781a; --band: #8cc3fa26; } }
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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 14px 0; }
.tiles div { background: var(--soft); border-radius: 6px; padding: 10px 14px; }
.tiles dt { font-size: 13px; } .tiles dd { margin: 0; font-size: 23px; line-height: 1.3; }
dd small { display: block; font-size: 13px; color: var(--quiet); }
figure { margin: 10px 0 0; } .scroll { overflow-x: auto; }
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
td code { overflow-wrap: normal; } th:last-child, td:last-child { padding-right: 0; }
summary { cursor: pointer; margin: 28px 0 8px; font-weight: 600; }
footer { margin-top: 40px; padding-top: 14px; border-top: 1px solid var(--rule); font-size: 13px; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
footer dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 22px 16px 32px; } h1 { font-size: 31px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles div:last-child { grid-column: span 2; }
  th, td { padding-right: 12px; } .verdict { padding-left: 14px; } }
@media print { main { padding: 0; max-width: none; } figure, tr, .tiles div { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll { overflow: visible; } svg { min-width: 0 !important; } }
"""


def html(result: Verification) -> str:
    """The whole page, to be stored as UTF-8."""
    from fossil_export.verifying.api import certificate

    record = certificate(result)
    title = f"{'Parity' if result.parity else 'Not the trained model'}: {result.artifact.name}"
    body = [_verdict(result), _weights_figures(record["weights"])]
    if result.forward is not None:
        body += [_forward_figures(result.forward), _module_plot(result.forward)]
    if result.tensors is not None:
        merged = [check for check in result.tensors if check.action == "merge"]
        body += [_heat_map(merged), _wrong(result.tensors), _merged(merged)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(body)}{_footer(result, record)}</main></body></html>\n"
    )


def _verdict(result: Verification) -> str:
    levels = [name for name, found in (("weights", result.tensors), ("forward", result.forward)) if found is not None]
    said = "The artifact is the trained model, up to rounding." if result.parity else result.problems[0]
    ran = f"Levels that ran: {' and '.join(levels)}" if levels else "No level could run"
    return (
        f'<header class="verdict{"" if result.parity else " bad"}">'
        f"<h1>{'Parity' if result.parity else 'Not the trained model'}</h1>"
        f'<p class="reason">{_text(said)}</p>{_reasons(result.problems[1:])}'
        f'<p class="quiet"><code>{_text(result.artifact)}</code><br/>{ran}; {result.seconds:.1f} s.</p></header>\n'
    )


def _reasons(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = [_text(problem) for problem in problems[:REASONS]]
    items += [f"and {len(problems) - REASONS:,} more"] if len(problems) > REASONS else []
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _weights_figures(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    worst = "not finite" if found["worst_error_in_steps"] is None else f"{found['worst_error_in_steps']:.4g}"
    wrong = f"{found['wrong']:,}"
    tiles = (
        ("Tensors compared", f"{found['tensors']:,}"),
        ("Merged", f"{found['merged']:,}"),
        ("Wrong", f'<span class="wrong">{wrong}</span>' if found["wrong"] else wrong),
        ("Worst error, in steps", f"{worst} <small>0.5 = exact rounding</small>"),
        ("Update that survived", _share(found["update_survived"])),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<section><h2>Weights</h2><dl class="tiles">{items}</dl></section>\n'


def _forward_figures(found: ForwardCheck) -> str:
    def error(name: str, trainer: float, artifact: float, limited: bool) -> list[str]:
        allowed = _number(FACTOR * trainer + FLOOR) if limited else ""
        return [name, _number(trainer), _number(artifact), allowed]

    trainer, artifact = found.trainer, found.artifact
    same = f"{found.same_continuations} of {found.continuations}" if found.continuations else "none made"
    rows = [
        error("Relative error, median position", trainer.relative_error, artifact.relative_error, True),
        error("Relative error, worst tenth", trainer.worst_tenth, artifact.worst_tenth, True),
        error("KL divergence, nats", trainer.kl, artifact.kl, False),
        ["Same likeliest token", _share(trainer.top1), _share(artifact.top1), ""],
        ["Same continuation as the trainer", "", same, ""],
    ]
    table = _table(["Distance from the truth", "Trainer", "Artifact", "Allowed"], rows, numbers=(1, 2, 3))
    return (
        f"<section><h2>Logits</h2><p class='quiet'>{found.prompts} prompts on {_text(found.device)}. The truth is the "
        f"unmerged model in {_text(found.truth_dtype)}, the trainer the same in {_text(found.trainer_dtype)}.</p>"
        f"{table}</section>\n"
    )


def _module_plot(found: ForwardCheck) -> str:
    """Relative error over the modules, on a log scale; what is off the scale lies on its edge."""
    modules = found.modules
    if not modules:
        return ""
    edges = [MODULE_FACTOR * error.trainer + FLOOR for error in modules]
    low, high = _decades([*edges, *(value for error in modules for value in (error.trainer, error.artifact))])
    step = (WIDTH - LEFT - RIGHT) / len(modules)
    across = [LEFT + (index + 0.5) * step for index in range(len(modules))]
    floor = HEIGHT - BOTTOM

    def height(value: float) -> float:
        share = (_log(value, low, high) - low) / (high - low)
        return round(floor - share * (floor - TOP), 1)

    def path(values: Iterable[float]) -> str:
        return "L".join(f"{x:.1f} {height(value)}" for x, value in zip(across, values, strict=True))

    shapes = [
        f'<path class="band" d="M{across[0]:.1f} {floor}L{path(edges)}L{across[-1]:.1f} {floor}Z"/>',
        _value_axis(low, high, height),
        _module_axis(modules, across),
        f'<path class="line trainer" d="M{path(error.trainer for error in modules)}"/>',
        f'<path class="line artifact" d="M{path(error.artifact for error in modules)}"/>',
        _first(found.first_outside, modules, across, height),
    ]
    for error, x in zip(modules, across, strict=True):
        told = _text(f"{error.module}: trainer {_number(error.trainer)}, artifact {_number(error.artifact)}")
        box = f'x="{x - step / 2:.1f}" y="{TOP}" width="{step:.2f}" height="{floor - TOP}"'
        shapes.append(f'<rect class="hit" {box}><title>{told}</title></rect>')
    first = ""
    if found.first_outside is not None:
        first = f' <span class="wrong">The first module outside it is <code>{_text(found.first_outside)}</code>.</span>'
    return (
        "<section><h2>Error by module</h2><figure><figcaption>Relative error of each module's output on the first "
        f"prompt. The shaded band is what rounding explains: up to {MODULE_FACTOR:g} times the trainer's error plus "
        f"{FLOOR:g}.{first}</figcaption>"
        '<div class="legend"><span><i class="t"></i>trainer</span><span><i></i>artifact</span>'
        '<span><i class="b"></i>band</span></div>'
        f"{_svg('modules', WIDTH, HEIGHT, 'Relative error by module, trainer and artifact', shapes)}"
        "</figure></section>\n"
    )


def _value_axis(low: int, high: int, height: Any) -> str:
    shapes = []
    for power in range(low, high + 1, 1 + (high - low) // 8):
        y = height(10.0**power)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    return f"{''.join(shapes)}<text x='{LEFT}' y='12' text-anchor='middle'>relative error</text>"


def _module_axis(modules: Sequence[ModuleError], across: Sequence[float]) -> str:
    """A tick where a layer begins, or every so many modules where they are not in layers."""
    begins: list[tuple[int, int]] = []
    last = None
    for index, error in enumerate(modules):
        layer = _layer(error.module)
        if layer is not None and layer != last:
            begins.append((index, layer))
            last = layer
    title = "modules in the order they run, by layer number" if begins else "modules in the order they run"
    begins = begins or [(index, index + 1) for index in range(len(modules))]
    floor, every = HEIGHT - BOTTOM, _every(len(begins), 16)
    shapes = [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{title}</text>']
    for index, label in begins[::every]:
        x = f"{across[index]:.1f}"
        shapes.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 5}"/>')
        shapes.append(f'<text x="{x}" y="{floor + 19}" text-anchor="middle">{label}</text>')
    return "".join(shapes)


def _first(name: str | None, modules: Sequence[ModuleError], across: Sequence[float], height: Any) -> str:
    """Mark of the module where the artifact leaves the band."""
    index = next((index for index, error in enumerate(modules) if error.module == name), None)
    if name is None or index is None:
        return ""
    x, y = across[index], height(modules[index].artifact)
    anchor, gap = ("start", 6) if x < WIDTH / 2 else ("end", -6)
    return (
        f'<line class="first" x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{HEIGHT - BOTTOM}"/>'
        f'<circle class="dot named" cx="{x:.1f}" cy="{y}" r="4"/>'
        f'<text class="named" x="{x + gap:.1f}" y="20" text-anchor="{anchor}">first outside: {_text(name)}</text>'
    )


def _heat_map(merged: Sequence[TensorCheck]) -> str:
    """Share of the update that survived, kinds of module by layers."""
    cells: dict[tuple[str, int | None], list[TensorCheck]] = {}
    prefixes = {_place(check)[0] for check in merged if _layer(check.module or check.name) is not None}
    for check in merged:
        prefix, layer, kind = _place(check)
        row = f"{prefix}.*.{kind}" if len(prefixes) > 1 and layer is not None else kind
        cells.setdefault((row, layer), []).append(check)
    if not cells:
        return ""
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns: list[int | None] = [*sorted({layer for _, layer in cells if layer is not None})]
    columns += [None] if any(layer is None for _, layer in cells) else []
    left = 12 + 7 * min(36, max(len(row) for row in rows))
    size = min(26.0, max(8.0, (WIDTH - left) / len(columns)))
    shapes = [
        f'<text x="{left - 8}" y="{21 * index + 14}" text-anchor="end">{_text(_shortened(row))}</text>'
        for index, row in enumerate(rows)
    ]
    every = _every(len(columns), int(size * len(columns) / 26) or 1)
    for index, layer in enumerate(columns):
        if layer is None or index % every == 0:
            x = f"{left + (index + 0.5) * size:.1f}"
            shapes.append(f'<text x="{x}" y="{21 * len(rows) + 14}" text-anchor="middle">{_column(layer)}</text>')
    for (row, layer), checks in cells.items():
        place = f'x="{left + columns.index(layer) * size:.1f}" y="{21 * rows.index(row)}"'
        shapes.append(_cell(checks, f'{place} width="{size - 1:.1f}" height="20"'))
    ramp = ", ".join(f"rgb{colour}" for _, colour in SCALE)
    lowest = min(merged, key=_rank)
    said = ""
    if lowest.survived is not None:
        said = f" Lowest: {_share(lowest.survived)}, <code>{_text(lowest.module or lowest.name)}</code>."
    wide = left + size * len(columns)
    return (
        "<section><h2>Survival of the update</h2><figure><figcaption>Share of each module's trained update that is "
        f"still there after rounding to the stored dtype; kinds of module by layer number.{said}</figcaption>"
        f'<div class="legend"><span>50 % or less<i class="r" style="background: linear-gradient(90deg, {ramp})"></i>'
        '100 %</span><span><i class="n"></i>no update</span></div>'
        f"{_svg('survival', wide, 21 * len(rows) + 22, 'Survival of the update by module', shapes)}"
        "</figure></section>\n"
    )


def _cell(checks: Sequence[TensorCheck], place: str) -> str:
    """One kind of module in one layer; of several (experts) the one that fared worst."""
    check = min(checks, key=_rank)
    told = f"{check.module or check.name}: {_share(check.survived)} survived"
    told += f", the lowest of {len(checks)}" if len(checks) > 1 else ""
    fill = 'class="cell none"' if check.survived is None else f'class="cell" fill="{_colour(check.survived)}"'
    return f"<rect {fill} {place}><title>{_text(told)}</title></rect>"


def _wrong(tensors: Sequence[TensorCheck]) -> str:
    wrong = [check for check in tensors if check.problem is not None]
    if not wrong:
        return ""
    rows = [[f"<code>{_text(check.name)}</code>", check.action, _text(check.problem)] for check in wrong[:WRONG]]
    more = f"<p>and {len(wrong) - WRONG:,} more</p>" if len(wrong) > WRONG else ""
    table = _table(["Tensor", "Action", "What is wrong"], rows)
    return f"<section><h2>Wrong tensors</h2>{table}{more}</section>\n"


def _merged(merged: Sequence[TensorCheck]) -> str:
    if not merged:
        return ""
    rows = [
        [f"<code>{_text(check.name)}</code>", _number(check.worst), f"{check.off:,}", _share(check.survived)]
        for check in merged
    ]
    table = _table(["Tensor", "Worst error, steps", "Elements off", "Survived"], rows, numbers=(1, 2, 3))
    return f"<details><summary>Every merged tensor ({len(merged):,})</summary>{table}</details>\n"


def _footer(result: Verification, record: dict[str, Any]) -> str:
    adapter = record["adapter"]
    facts = {
        "Artifact": str(result.artifact),
        "Adapter": f"{adapter['name']} ({adapter['variant']}, rank {adapter['rank']})",
        "Base": record["base"],
        "Device": record["device"],
        "Versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "Made by": f"{record['tool']['name']} {record['tool']['version']}",
    }
    return (
        f"<footer><dl>{''.join(f'<dt>{name}</dt><dd>{_text(fact)}</dd>' for name, fact in facts.items())}</dl></footer>"
    )


def _svg(name: str, width: float, height: float, label: str, shapes: Iterable[str]) -> str:
    """At most its own size; on a narrow screen it is scrolled rather than shrunk beyond reading."""
    return (
        f'<div class="scroll" tabindex="0"><svg id="{name}" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width: {width:.0f}px; min-width: {min(width, 620):.0f}px">'
        f"{''.join(shapes)}</svg></div>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """`rows` are HTML already; the columns `numbers` are set to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="number"' if index in numbers else "" for index in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'


def _place(check: TensorCheck) -> tuple[str, int | None, str]:
    """What comes before the layer number, the number, and the kind of module; experts are one kind."""
    name = check.module or check.name
    found = LAYERED.match(name)
    if not found:
        return "", None, name
    prefix, layer, kind = found.groups()
    return prefix or "", int(layer), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind or prefix or name)


def _layer(module: str) -> int | None:
    found = LAYERED.match(module)
    return int(found.group(2)) if found else None


def _rank(check: TensorCheck) -> float:
    """For finding the lowest survival: no figure is lower than any, no update higher."""
    value = check.survived
    return math.inf if value is None else value if math.isfinite(value) else -math.inf


def _colour(share: float) -> str:
    value = min(1.0, max(0.5, share)) if math.isfinite(share) else 0.5
    low, high = (SCALE[0], SCALE[1]) if value < SCALE[1][0] else (SCALE[1], SCALE[2])
    way = (value - low[0]) / (high[0] - low[0])
    return "#" + "".join(f"{round(a + way * (b - a)):02x}" for a, b in zip(low[1], high[1], strict=True))


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Powers of ten around those of `values` that have a logarithm."""
    logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0]
    high = math.ceil(max(logs, default=0.0))
    low = max(math.floor(min(logs, default=-1.0)), high - DECADES)
    return min(low, high - 1), high


def _log(value: float, low: int, high: int) -> float:
    """Clipped; NaN is as far off as can be."""
    if math.isnan(value):
        return high
    return min(high, max(low, math.log10(value))) if 0 < value < math.inf else (high if value > 0 else low)


def _every(count: int, labels: int) -> int:
    """1, 2, 5, 10, ...: label one in so many of `count` to have about `labels`."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count <= step * labels)


def _number(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %" if math.isfinite(value) else "not finite"


def _column(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _shortened(name: str) -> str:
    return name if len(name) <= 36 else f"…{name[-35:]}"


def _text(value: object) -> str:
    """Escaped, without what neither UTF-8 nor XML can hold (file names may have it)."""
    kept = str(value).encode("utf-8", "replace").decode()
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", kept))
