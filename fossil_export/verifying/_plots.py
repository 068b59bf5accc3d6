"""The report's pictures as inline SVG: error by module, survival by layer and kind of module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fossil_export.verifying._bounds import FLOOR, MODULE_FACTOR
from fossil_export.verifying._markup import number, share_text, text

if TYPE_CHECKING:
    from fossil_export.verifying._bounds import ModuleError
    from fossil_export.verifying._forward import ForwardCheck
    from fossil_export.verifying._weights import TensorCheck

WIDTH, HEIGHT = 900, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 46
"""Of the plot and its margins, in pixels at full size."""

DECADES = 12
"""Powers of ten the error axis spans at most; what is smaller is drawn on its lower edge."""

SCALE = ((0.5, (244, 170, 48)), (0.75, (138, 152, 164)), (1.0, (31, 78, 130)))
"""Share of the update that survived and its colour: amber to blue, ever darker, so that it can be read by
the colour-blind and in a grey print."""

LAYERED = re.compile(r"^(?:(.*?)\.)?(\d+)(?:\.(.*))?$", re.DOTALL)


def module_plot(found: ForwardCheck) -> str:
    """Relative error over the modules, on a log scale; what is off the scale lies on its edge."""
    modules = found.modules
    if not modules:
        return ""
    edges = [MODULE_FACTOR * error.trainer + FLOOR + error.noise for error in modules]
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
        told = text(f"{error.module}: trainer {number(error.trainer)}, artifact {number(error.artifact)}")
        box = f'x="{x - step / 2:.1f}" y="{TOP}" width="{step:.2f}" height="{floor - TOP}"'
        shapes.append(f'<rect class="hit" {box}><title>{told}</title></rect>')
    first, explains = "", "rounding and products of 8 bits explain" if found.noise else "rounding explains"
    if found.first_outside is not None:
        first = f' <span class="wrong">The first module outside it is <code>{text(found.first_outside)}</code>.</span>'
    return (
        "<section><h2>Error by module</h2><figure><figcaption>Relative error of each module's output on the first "
        f"prompt. The shaded band is what {explains}: up to {MODULE_FACTOR:g} times the trainer's error plus "
        f"<span class='number'>{FLOOR + found.noise:g}</span>.{first}</figcaption>"
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
        f'<text class="named" x="{x + gap:.1f}" y="20" text-anchor="{anchor}">first outside: {text(name)}</text>'
    )


def heat_map(merged: Sequence[TensorCheck]) -> str:
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
        f'<text x="{left - 8}" y="{21 * index + 14}" text-anchor="end">{text(_shortened(row))}</text>'
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
        said = f" Lowest: {share_text(lowest.survived)}, <code>{text(lowest.module or lowest.name)}</code>."
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
    told = f"{check.module or check.name}: {share_text(check.survived)} survived"
    told += f", the lowest of {len(checks)}" if len(checks) > 1 else ""
    fill = 'class="cell none"' if check.survived is None else f'class="cell" fill="{_colour(check.survived)}"'
    return f"<rect {fill} {place}><title>{text(told)}</title></rect>"


def _svg(name: str, width: float, height: float, label: str, shapes: Iterable[str]) -> str:
    """At most its own size; on a narrow screen it is scrolled rather than shrunk beyond reading."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<svg id="{name}" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width: {width:.0f}px; min-width: {min(width, 760):.0f}px">'
        f"{''.join(shapes)}</svg></div>"
    )


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


def _column(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _shortened(name: str) -> str:
    return name if len(name) <= 36 else f"…{name[-35:]}"
