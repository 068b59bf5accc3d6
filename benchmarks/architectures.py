"""Hold the table of architectures against transformers, for all classes that it knows, and time both.

python benchmarks/architectures.py [MODEL_TYPE …]
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter

from fossil_export.models import _table, _transformers
from fossil_export.models._architecture import Architecture

FACTS = ("prefix", "embedding", "head", "follows_tie", "rules", "ignored", "optional", "parts")


def differences(live: Architecture, table: Architecture) -> list[str]:
    """What the two say differently, by name of the field."""
    found = [what for what in FACTS if getattr(live, what) != getattr(table, what)]
    if not all(map(table.has, live.shapes or ())):
        found.append("names")
    if len(table.patterns) > len(live.patterns) and "*" in "".join(table.patterns - live.patterns):
        found.append("more names (other configs)")
    said = [(re.compile("^" + tie.target), tie.on, tie.field, tie.also) for tie in table.ties]
    if not all(
        any(t.search(tie.target) and rest == (tie.on, tie.field, tie.also) for t, *r in said if (rest := tuple(r)))
        for tie in live.ties
    ):
        found.append("ties")
    return found


def main() -> None:
    """Print each class that differs, and the sums."""
    logging.disable(logging.ERROR)
    counts: Counter[str] = Counter()
    spent = Counter[str]()
    for model_type in sys.argv[1:] or _table.model_types():
        for name in sorted(set(_table.classes(model_type).values())):
            start = time.perf_counter()
            table = _table.read({"model_type": model_type}, name)
            middle = time.perf_counter()
            live = _transformers.read({"model_type": model_type}, name)
            spent["table"] += int(1e6 * (middle - start))
            spent["transformers"] += int(1e6 * (time.perf_counter() - middle))
            what = ["no live"] if live is None else ["no table"] if table is None else differences(live, table)
            counts.update(what or ["same"])
            counts["classes"] += 1
            if set(what) - {"more names (other configs)"}:
                print(f"{model_type} {name}: {', '.join(what)}", flush=True)
    print(dict(counts), {who: f"{1e-3 * µs / max(1, counts['classes']):.2f} ms a class" for who, µs in spent.items()})


if __name__ == "__main__":
    main()
