"""The command, run in this process, and how it must refuse."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from fossil_export.cli import main

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QPROJ = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *mentions: str) -> None:
    """One line of error that mentions all of `mentions`; no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for mention in mentions:
        assert mention in result.stderr, result.stderr


def first_file(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[0]
