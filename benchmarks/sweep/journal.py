"""Rows as they come, in a file of JSON lines, so that a sweep can be taken up again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import peft
import torch
import transformers

import fossil_export
from sweep.cases import ALL_DONE, NOT_BUILT, Row


def version() -> str:
    """Of the code that merges, the code that judges, and the libraries between them."""
    digest = hashlib.sha256(f"{transformers.__version__} {peft.__version__} {torch.__version__}".encode())
    for package in (Path(fossil_export.__file__).parent, Path(__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Journal:
    """Rows of this version by class and kind; those of other versions stay in the file and are not looked at."""

    def __init__(self, path: Path) -> None:
        self.path, self.version = path, version()
        self.rows: dict[tuple[str, str], Row] = {}
        for text in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(text)
            if entry.pop("version") == self.version:
                row = Row(**entry)
                self.rows[row.name, row.kind] = row
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows[row.name, row.kind] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"version": self.version} | vars(row)) + "\n")

    def done(self, name: str) -> set[str]:
        return {kind for other, kind in self.rows if other == name}

    def finished(self, name: str, kinds: list[str]) -> bool:
        if (name, NOT_BUILT) in self.rows:
            return True
        last = self.rows.get((name, ALL_DONE))
        return last is not None and set(kinds) <= set(last.peft.split(", "))
