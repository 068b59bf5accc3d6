"""Make docs/terminal.svg: what a terminal of 80 columns shows of a merge and its check, with the real output.

    python docs/pictures.py

The model and the adapter are those of examples/demo.py. The picture follows the reader's light or dark setting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    ("merge", "my-adapter", "--output", "my-model"),
    ("verify", "my-model", "--level", "weights"),
)
COLUMNS, LINE, CHARACTER, MARGIN, BAR = 80, 20, 8.43, 18, 34

TITLE = "A merge and its check on a terminal"
STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1c2127;
  white-space: pre; }
.page { fill: #fbfaf8; stroke: #d0ccc4; } .typed { font-weight: 600; } .prompt { fill: #17713f; }
circle { fill: #d0ccc4; }
@media (prefers-color-scheme: dark) { text { fill: #e2e5e9; } .page { fill: #15181c; stroke: #3a414a; }
  .prompt { fill: #62cb90; } circle { fill: #3a414a; } }
"""


def session(folder: Path) -> list[tuple[bool, str]]:
    """The lines of the session; whether each was typed."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    (folder / "my-adapter").symlink_to(smollm2.adapter())
    plain = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    lines: list[tuple[bool, str]] = []
    for command in COMMANDS:
        line = [sys.executable, "-m", "fossil_export", *command]
        done = subprocess.run(line, cwd=folder, env=plain, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        shown = done.stdout.replace(str(folder.resolve()), "/models").replace(str(folder), "/models")
        lines += [(False, "")] * bool(lines) + [(True, f"fossil-export {' '.join(command)}")]
        lines += [(False, one) for one in shown.splitlines()]
    return lines


def drawn(lines: list[tuple[bool, str]]) -> str:
    """The picture. Raises SystemExit for a line that a terminal of that width would break."""
    for typed, line in lines:
        if len(line) + 2 * typed > COLUMNS:
            raise SystemExit(f"wider than {COLUMNS} columns: {line}")
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), BAR + LINE * len(lines) + MARGIN
    said = "\n".join(f"$ {line}" if typed else line for typed, line in lines)
    shapes = [f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>']
    shapes += [f'<circle cx="{MARGIN + 4 + 18 * place}" cy="18" r="5"/>' for place in range(3)]
    for number, (typed, line) in enumerate(lines):
        place = f'x="{MARGIN}" y="{BAR + LINE * number + 15}"'
        if typed:
            shapes.append(
                f'<text {place}><tspan class="prompt">$ </tspan><tspan class="typed">{escape(line)}</tspan></text>'
            )
        elif line:
            shapes.append(f"<text {place}>{escape(line)}</text>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'xml:space="preserve" role="img" aria-label="{TITLE}"><title>{TITLE}</title>'
        f"<desc>{escape(said)}</desc><style>{STYLE}</style>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        picture = drawn(session(Path(temporary)))
    target = ROOT / "docs" / "terminal.svg"
    target.write_text(picture, encoding="utf-8")
    print(f"{target} ({len(picture.encode()):,} bytes)")


if __name__ == "__main__":
    main()
