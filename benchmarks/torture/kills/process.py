"""The command in a child forked from a process that has imported everything: kills fall on its work, and are many."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 60.0
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True)
class Ended:
    """`status` is the exit code, or minus the signal that killed it."""

    status: int
    seconds: float
    words: str


def run(arguments: list[str], folder: Path, number: int = 0, after: float = PATIENCE) -> Ended:
    """The command, with `folder / "tmp"` for temporary files; `after` so many seconds it gets the signal `number`."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    words = folder / ".words"
    words.write_bytes(b"")
    began = time.monotonic()
    # Signals that come before the command takes them would tell nothing of it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if child == 0:
        _in_child(arguments, folder, words)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    end, is_sent = began + PATIENCE, number == 0
    while (now := time.monotonic()) < end:
        if not is_sent and now >= began + after:
            os.kill(child, number)
            is_sent = True
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            said = words.read_text(errors="replace")
            words.unlink()
            return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - began, said)
        time.sleep(0.0005 if is_sent else max(0.0, min(0.0005, began + after - now)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    words.unlink()
    return Ended(-signal.SIGKILL, PATIENCE, "stuck")


def modules(arguments: list[str], folder: Path) -> list[str]:
    """What the command imports, told by a child that ran it; raises RuntimeError if it fails."""
    found = folder / ".modules"
    os.environ["TORTURE_MODULES"] = str(found)
    ended = run(arguments, folder)
    del os.environ["TORTURE_MODULES"]
    if ended.status:
        raise RuntimeError(f"{' '.join(arguments)}: {ended}")
    names = found.read_text().split()
    found.unlink()
    return names


def preload(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # a module that was made by another one
                importlib.import_module(name)


def _in_child(arguments: list[str], folder: Path, words: Path) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        descriptor = os.open(words, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number, target in ((0, nowhere), (1, nowhere), (2, descriptor)):
            os.dup2(target, number)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        for one in _SIGNALS:
            signal.signal(one, signal.default_int_handler)
        code = _command(arguments)
        if place := os.environ.get("TORTURE_MODULES"):
            Path(place).write_text("\n".join(sys.modules))
    finally:
        os._exit(code)


def _command(arguments: list[str]) -> int:
    from fossil_export import _start, cli

    command = cli.main

    def unblocked(*given: object, **options: object) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        command(*given, **options)

    cli.main = unblocked  # type: ignore[assignment]
    sys.argv = ["fossil-export", *arguments]
    try:
        _start.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
