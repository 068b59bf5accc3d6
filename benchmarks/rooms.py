"""A picture of the package's rooms: which one imports which, read from the source.

    python benchmarks/rooms.py --write docs/rooms.svg

A room stands above all that it imports. Arrows that follow from others are left out.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fossil_export"
KNOWS = {
    "commands": "options, tables",
    "publishing": "to the Hub",
    "cards": "model cards",
    "verifying": "is it the model?",
    "onnx": "graphs",
    "converting": "other formats",
    "clusters": "Ray",
    "artifacts": "kinds of folders",
    "merging": "plan, run, record",
    "adapters": "what was trained",
    "methods": "the formulas",
    "models": "names, ties",
    "checkpoints": "files of weights",
    "storage": "where files are",
    "writing": "whole or not at all",
    "kernels": "loops in C",
}
WIDTH, WIDE, HIGH, GAP, STEP = 720, 150, 44, 16, 74
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .name { font-weight: 600 } .what { font-size: 11px; fill: #59636e }
  rect { fill: #f6f8fa; stroke: #8c959f } path { fill: none; stroke: #8c959f } marker path { fill: #8c959f }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .what { fill: #9198a1 } rect { fill: #151b23; stroke: #656c76 } path { stroke: #656c76 }
    marker path { fill: #656c76 }
  }"""


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module, without those that are only for the types."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from running(child)


def imports() -> dict[str, dict[str, int]]:
    """For each room, how many modules of it import from which other rooms when they run."""
    found: dict[str, dict[str, int]] = {room: defaultdict(int) for room in KNOWS}
    for room in KNOWS:
        for path in (PACKAGE / room).rglob("*.py"):
            names: set[str] = set()
            for node in running(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names.update([node.module, *(f"{node.module}.{one.name}" for one in node.names)])
                elif isinstance(node, ast.Import):
                    names.update(one.name for one in node.names)
            for other in {name.split(".")[1] for name in names if name.startswith("fossil_export.")}:
                if other in KNOWS and other != room:
                    found[room][other] += 1
    return found


def below(found: dict[str, dict[str, int]]) -> dict[str, set[str]]:
    """The rooms that each one stands on: of two that import each other, the one that is imported more often."""
    return {
        room: {other for other, count in others.items() if count > found[other].get(room, 0)}
        for room, others in found.items()
    }


def levels(stands: dict[str, set[str]]) -> dict[str, int]:
    """0 for a room that stands on none, else one more than the highest that it stands on."""
    found: dict[str, int] = {}

    def level(room: str, above: tuple[str, ...] = ()) -> int:
        if room not in found:
            if room in above:
                raise SystemExit(f"rooms import each other in a circle: {' → '.join((*above, room))}")
            found[room] = max((level(one, (*above, room)) + 1 for one in stands[room]), default=0)
        return found[room]

    for room in stands:
        level(room)
    return found


def reach(stands: dict[str, set[str]], room: str) -> set[str]:
    return stands[room].union(*(reach(stands, one) for one in stands[room]))


def draw() -> str:
    stands = below(imports())
    of = levels(stands)
    top = max(of.values())
    rows = [[room for room in KNOWS if of[room] == level] for level in range(top, -1, -1)]
    at: dict[str, tuple[float, float]] = {}
    for index, row in enumerate(rows):
        left = (WIDTH - len(row) * WIDE - (len(row) - 1) * GAP) / 2
        # Rows by turns to one side, so that arrows pass beside boxes.
        shift = 0 if len(row) > 3 else (-1) ** index * 90
        at |= {room: (left + shift + place * (WIDE + GAP), 12.0 + index * STEP) for place, room in enumerate(row)}
    lines = []
    for room, others in stands.items():
        for other in sorted(others - set().union(*(reach(stands, one) for one in others))):
            (x, y), (to_x, to_y) = at[room], at[other]
            x, to_x, y = x + WIDE / 2, to_x + WIDE / 2, y + HIGH
            bend = (to_y - y) / 2
            lines.append(
                f'<path d="M{x:g} {y:g} C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y - 3:g}" '
                'marker-end="url(#arrow)"/>'
            )
    for room, (x, y) in at.items():
        middle = x + WIDE / 2
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDE}" height="{HIGH}" rx="6"/>'
            f'<text class="name" x="{middle:g}" y="{y + 20:g}">{room}/</text>'
            f'<text class="what" x="{middle:g}" y="{y + 36:g}">{KNOWS[room]}</text>'
        )
    height = 24 + top * STEP + HIGH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">\n'
        "<title>The rooms of fossil_export: each stands above those that it imports</title>\n"
        f"<style>{STYLE}\n</style>\n"
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>\n' + "\n".join(lines) + "\n</svg>\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE.svg")
    given = parser.parse_args()
    if given.write is None:
        for name, others in sorted(imports().items()):
            print(name, dict(sorted(others.items(), key=lambda one: -one[1])))
    else:
        given.write.write_text(draw())
