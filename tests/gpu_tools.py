"""The GPU benchmark, started on the CPU, and its journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_parity
from gpu import main

ROOT = Path(gpu_parity.__file__).parent.parent
SMALL = ("--device", "cpu", "--small", "--steps", "3", "--lr", "3e-3")
QUICK = (*SMALL, "--parts", "layers", "--dtypes", "float32")
BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*options: object, script: Path = Path(gpu_parity.__file__), **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **{"env": BARE, **more})


def here(*options: object) -> int:
    return main.main("", 0.0, [str(option) for option in options])


def entries(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal after its first."""
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def findings(journal: Path) -> dict[str, dict[str, Any]]:
    """By case, the row without its timings."""
    return {str(e["case"]): e["row"] | {"speeds": (), "seconds": ()} for e in entries(journal)}
