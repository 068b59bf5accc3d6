"""Runs the commands of one kind of case with the checkout that PYTHONPATH names; a process of its own.

    python worker.py JOBS.json RESULTS.json CHECKOUT

It imports nothing of this package: the checkout may be another one than this file's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    jobs, results, checkout = map(Path, sys.argv[1:])
    sys.path.remove(str(Path(__file__).parent))

    import fossil_export

    if not Path(fossil_export.__file__).resolve().is_relative_to(checkout.resolve()):
        sys.exit(f"fossil_export comes from {fossil_export.__file__}, not from {checkout}")

    from click.testing import CliRunner

    from fossil_export.cli import main as command

    found: list[list[dict[str, Any]]] = []
    for commands in json.loads(jobs.read_text()):
        found.append([])
        for arguments in commands:
            result = CliRunner().invoke(command, arguments)
            crash = None if isinstance(result.exception, (SystemExit, type(None))) else repr(result.exception)
            told = {"exit": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "crash": crash}
            found[-1].append(told)
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
