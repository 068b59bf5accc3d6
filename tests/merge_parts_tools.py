"""The command that makes a part of a merge, and what lies beside its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fossil_export import cli


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.main, ["merge", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert code == 0 or "Traceback" not in result.output
    return result


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in {"base", "qv", "k", "whole"})
