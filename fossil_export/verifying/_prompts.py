"""The built-in prompts: several languages, code, arithmetic, dialogue; each a dozen or so tokens."""

from __future__ import annotations

from pathlib import Path

from fossil_export.checkpoints._jsonfile import MAX_BYTES
from fossil_export.errors import FossilExportError, unreadable

PROMPTS = (
    "The capital of France is a city on the river",
    "Water boils at one hundred degrees because",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "SELECT name, COUNT(*) FROM orders GROUP BY",
    "12 + 30 = 42, and 17 * 3 =",
    "Once upon a time there was a small village",
    "User: How do I bake bread?\nAssistant: First you",
    "Der schnelle braune Fuchs springt über den",
    "El perro duerme mientras la lluvia cae sobre",
    "La bibliothèque ouvre ses portes à neuf heures et",
    "<html><head><title>My page</title></head><body>",
    "The opposite of hot is cold, the opposite of tall is",
    "In 1969 two astronauts walked on the surface of the",
    '{"name": "Ada", "year": 1815, "field":',
    "To be, or not to be, that is the",
    "The recipe needs two eggs, a cup of milk and a",
)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line, blank lines passed over. Raises FossilExportError for a file without any."""
    try:
        with Path(path).open("rb") as file:  # a pipe, too, which has no size and may have no end
            content = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise FossilExportError(unreadable(path, problem)) from problem
    if len(content) > MAX_BYTES:
        raise FossilExportError(f"{path}: has more than {MAX_BYTES:,} bytes, too many for prompts; name a text file")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise FossilExportError(f"{path}: cannot be read as UTF-8 text: {problem}; save it as UTF-8") from problem
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise FossilExportError(f"{path}: holds no prompts, write one a line")
    return prompts
