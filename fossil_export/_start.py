"""Where `fossil-export` begins: signals are taken before anything that takes time is imported."""
# ruff: noqa: E402

from __future__ import annotations

from fossil_export._isolation import forget_current_folder

forget_current_folder()  # before anything that is installed is imported, and could come from there

import os
import sys

from fossil_export._signals import Signals


def main() -> None:
    """Run the command that this process was started with; raises SystemExit."""
    _open_standard()
    signals = Signals()
    signals.take()
    try:
        from fossil_export.cli import main as command

        command(prog_name="fossil-export")
    finally:
        signals.over()


def _open_standard() -> None:
    """Give `>&-` somewhere to go: the next file that is opened would become stdout or stderr, and be printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for good
