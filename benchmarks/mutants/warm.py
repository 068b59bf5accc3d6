"""pytest in forks of a process that has imported what takes long; the package itself each fork imports anew."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = "fossil_export"
_HEAVY = [
    "pytest",
    "hypothesis",
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "safetensors.torch",
]
_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]


def warm_up() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in _HEAVY:
        importlib.import_module(name)
    if PACKAGE in sys.modules:
        sys.exit(f"{PACKAGE} is imported before there is a mutant of it")


def take_package_from(tree: Path) -> None:
    """From here on, this process and all that it starts."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(tree))


@contextlib.contextmanager
def copied_package(source: Path, folder: Path) -> Iterator[Path]:
    """A folder with a copy of the package, whose compiled files are checked by content: the times of two mutants may
    be the same."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    compiler = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", str(folder)]
    subprocess.run(compiler, check=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_pytest(tests: list[str], seconds: float, log: Path, plugins: tuple[object, ...] = ()) -> int | None:
    """pytest's exit code, or None where it took longer than `seconds`."""

    def call() -> int:
        import pytest

        return int(pytest.main([*_OPTIONS, *tests], plugins=list(plugins)))

    return forked(call, seconds, log)


def forked(call: Callable[[], int], seconds: float, log: Path) -> int | None:
    pid = os.fork()
    if pid == 0:
        _child(call, log)
    ended, deadline = 0, time.monotonic() + seconds
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _child(call: Callable[[], int], log: Path) -> None:
    code = 99
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
