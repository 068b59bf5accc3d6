"""What came of it: a summary for the terminal, and docs/support.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import peft
import transformers

from sweep.cases import (
    ALL_DONE,
    ALL_KINDS,
    BUILT,
    CRASH,
    EXACT,
    IMPOSSIBLE,
    NOT_BUILT,
    REFUSED,
    RESULTS,
    RIGHT,
    UNUSED,
    WRONG,
    Row,
)

_SIGNS = {EXACT: "✓", RIGHT: "≈", REFUSED: "r", IMPOSSIBLE: "–", UNUSED: "u", WRONG: "**W**", CRASH: "**C**"}
_MEANINGS = {
    EXACT: "the values are the trainer's, and to the bit those of PEFT's own merge where that is right",
    RIGHT: "the values are the trainer's within float32's rounding, not PEFT's bits",
    REFUSED: "refused with a line that says why",
    IMPOSSIBLE: "PEFT cannot train or save this",
    UNUSED: "the trainer does not compute with all that it trained; what it does not is left out, its answers are kept",
    WRONG: "wrong without a word",
    CRASH: "an error that is not one line",
}


def cases(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.kind not in (NOT_BUILT, ALL_DONE)]


def unbuilt(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.kind == NOT_BUILT]


def built(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.result == BUILT]


def summary(rows: list[Row]) -> str:
    done, bad = cases(rows), [row for row in rows if row.result in (WRONG, CRASH)]
    lines = [f"{row.result} {row.name}, {row.kind}: {row.why} (PEFT {row.peft})" for row in sorted(bad, key=_order)]
    return "\n".join([*lines, *_counts(rows, done)])


def _order(row: Row) -> tuple[str, str, str]:
    return row.model_type, row.name, row.kind


def _counts(rows: list[Row], done: list[Row]) -> list[str]:
    counts = Counter(row.result for row in done)
    types = {row.model_type for row in built(rows)}
    all_types = types | {row.model_type for row in unbuilt(rows)}
    right = [row for row in done if row.peft == "right"]
    bits = sum(row.result == EXACT for row in right)
    peft_wrong = [row for row in done if row.peft.startswith("wrong")]
    mended = sum(row.result in (EXACT, RIGHT) for row in peft_wrong)
    return [
        f"{len(built(rows))} classes of {len(types)} model types built, of {len(all_types)}; {len(done)} cases: "
        + ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result]),
        f"of {len(right)} that PEFT merges right, {bits} are the same to the bit here ({_share(bits, len(right))})",
        f"of {len(peft_wrong)} that PEFT merges wrong, {mended} are right here ({_share(mended, len(peft_wrong))})",
        f"{sum(row.forward for row in done)} were also run and their answers compared",
    ]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def support(rows: list[Row], kinds: Sequence[str] = ALL_KINDS) -> str:
    """docs/support.md, or docs/support-lora.md, of these kinds of adapters."""
    done = cases(rows)
    columns = [kind for kind in ALL_KINDS if kind in kinds]
    text = [
        "# Which models and adapters",
        "",
        "Written by `make sweep`: every class in transformers' auto mappings that can be built as a tiny random model, "
        "trained in each way with PEFT, merged here, loaded by its own class and compared with the live trained "
        f"model: every value, and the answers where inputs could be made. transformers {transformers.__version__}, "
        f"PEFT {peft.__version__}, float32.",
        "",
        *(f"- {line}" for line in _counts(rows, done)),
        "",
        "| | |",
        "|---|---|",
        *(f"| {_SIGNS[result]} | {_MEANINGS[result]} |" for result in RESULTS),
        "",
        "A cell has the number of classes where there are several, and is empty where a model has no such part. "
        "`embedding`, `head`, `norm` and `classifier` are whole modules (`modules_to_save`) beside shards on one of "
        "attention's layers. Kinds without another name are MiSS's (tile), in [support.md](support.md); those of LoRA "
        "and DoRA are in [support-lora.md](support-lora.md).",
        "",
        "| model type | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *_table(done, columns),
        "",
        "## Refused, by the line",
        "",
        *_grouped(row for row in done if row.result == REFUSED),
        "",
        "## Wrong or crashed",
        "",
        *([f"- {row.name}, {row.kind}: {row.why}" for row in sorted(done, key=_order) if row.result in (WRONG, CRASH)]
          or ["None."]),
        "",
        "## Not built",
        "",
        *_grouped(unbuilt(rows)),
        "",
    ]  # fmt: skip
    return "\n".join(text)


def _table(done: list[Row], columns: Sequence[str]) -> Iterable[str]:
    cells: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in done:
        cells[row.model_type][row.kind][row.result] += 1
    for model_type, kinds in sorted(cells.items()):
        yield f"| {model_type} | " + " | ".join(_cell(kinds[kind]) for kind in columns) + " |"


def _cell(counts: Counter[str]) -> str:
    several = sum(counts.values()) > 1
    return " ".join(f"{counts[r] if several else ''}{_SIGNS[r]}" for r in RESULTS if counts[r])


def _grouped(rows: Iterable[Row]) -> list[str]:
    """One line for each reason, names and numbers in it aside."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_reason(row.why)].append(row)
    lines = []
    for found in sorted(groups.values(), key=lambda each: -len(each)):
        types = sorted({row.model_type for row in found})
        shown = ", ".join(types[:40]) + (f" and {len(types) - 40} more" if len(types) > 40 else "")
        lines.append(f"- {len(found)} × `{found[0].why[:160].replace('`', '')}`: {shown}")
    return lines or ["None."]


def _reason(why: str) -> str:
    text = re.sub(r"has no weights for .*?, which", "has no weights for it, which", why)
    return re.sub(
        r"[\w-]+(\.[\w*-]+)+|\d[\d,.e-]*|\w+_\w+|'[^']*'|\b[A-Z]\w+(Model|Backbone|Loss|Config)\b", "…", text
    )[:90]
