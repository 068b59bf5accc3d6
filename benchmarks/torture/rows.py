"""What happened, one attempt a row, kept as lines of JSON so that a long run can be stopped and taken up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One attempt. `case` is what was attempted, `place` where (a disk, tmpfs, …), `seed` makes it again with
    `--only CASE --seed SEED --count 1`, `outcome` is a word of the kind's `OUTCOMES`, `detail` what a reader of a bad
    one needs."""

    kind: str
    case: str
    place: str
    seed: int
    outcome: str
    detail: str = ""


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def rows(self, kind: str) -> list[Row]:
        """Those of `kind`; of attempts made twice the last one counts."""
        found = {(row.case, row.place, row.seed): row for row in self._all() if row.kind == kind}
        return list(found.values())

    def _all(self) -> Iterator[Row]:
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                yield Row(**json.loads(line))
