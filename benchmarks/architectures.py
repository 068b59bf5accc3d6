"""Hold the table of architectures against transformers, for all classes that it knows, and time both.

python benchmarks/architectures.py [MODEL_TYPE …]
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter
from dataclasses import replace

from fossil_export.models import _defaults, _table, _transformers
from fossil_export.models._architecture import Architecture, Tie

_EXPECTED = {"more names (other configs)", "unknown to both"}
FACTS = ("prefix", "embedding", "head", "follows_tie", "rules", "ignored", "optional", "parts")


def differences(live: Architecture, table: Architecture) -> list[str]:
    """What the two say differently, by name of the field."""
    found = [what for what in FACTS if getattr(live, what) != getattr(table, what)]
    if not all(map(table.has, live.shapes or ())):
        found.append("names")
    if len(table.patterns) > len(live.patterns) and "*" in "".join(table.patterns - live.patterns):
        found.append("more names (other configs)")
    known = all(
        any(_about(other, tie) and re.search(other.source, tie.source) for other in table.ties) for tie in live.ties
    )
    if not known or not all(any(_about(tie, other) for other in live.ties) for tie in table.ties):
        found.append("ties")
    return found


def _about(tie: Tie, other: Tie) -> bool:
    """Whether a tie of the table, whose names may be patterns, is about the parameter of one of transformers'."""
    same = replace(tie, target="", source="") == replace(other, target="", source="")
    return same and re.search("^" + tie.target, other.target) is not None


def main() -> int:
    """Print each class that differs, and the sums. Fails if one does."""
    logging.disable(logging.ERROR)
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    wrong = 0
    for model_type in sys.argv[1:] or _table.model_types():
        config = _defaults.content(model_type)
        for name in sorted(set(_table.classes(model_type).values())):
            start = time.perf_counter()
            table = _table.read(config, name)
            middle = time.perf_counter()
            live = _transformers.read(config, name)
            spent["table"] += int(1e6 * (middle - start))
            spent["transformers"] += int(1e6 * (time.perf_counter() - middle))
            if live is None or table is None:
                what = ["unknown to both"] if live is table else ["no live"] if live is None else ["no table"]
            else:
                what = differences(live, table)
            counts.update(what or ["same"])
            counts["classes"] += 1
            if set(what) - _EXPECTED:
                print(f"{model_type} {name}: {', '.join(what)}", flush=True)
                wrong += 1
    print(dict(counts), {who: f"{1e-3 * µs / max(1, counts['classes']):.2f} ms a class" for who, µs in spent.items()})
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())
