"""Ctrl-C, `kill` and a closed terminal, at the moments when Python is bad at them."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import interruptible

CODES = {signal.SIGINT: (130, "Aborted!\n"), signal.SIGTERM: (143, ""), signal.SIGHUP: (129, "")}

# The command with a body of the test's, which says "ready" when its moment has come.
HARNESS = """
import os, sys, time, threading
from fossil_export import _start, _signals, cli
def ready(): os.write(1, b"ready\\n")
def command(**options):
{body}
cli.main = command
_start.main()
"""


@contextlib.contextmanager
def started(body: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    script = HARNESS.format(body="\n".join(f"    {line}" for line in body.strip("\n").splitlines()))
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )
    with process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
        process.kill()


def ended(process: subprocess.Popen[str], number: int, timeout: float = 25.0) -> None:
    _, words = process.communicate(timeout=timeout)
    assert (process.returncode, words) == CODES[signal.Signals(number)]


MOMENTS = {
    "work": "ready(); time.sleep(30)",
    "a destructor": """
class Slow:
    def __del__(self): ready(); time.sleep(0.5)
Slow(); time.sleep(30)
""",
    "a callback of weakref": """
import weakref
class Thing: pass
thing = Thing()
kept = weakref.ref(thing, lambda gone: (ready(), time.sleep(0.5)))
del thing; time.sleep(30)
""",
    "a library that swallows it, and goes on": """
_signals.PATIENCE = 1.2
ready()
for _ in range(30):
    try: time.sleep(1)
    except BaseException: pass
""",
    "a library that swallows it, and ends": """
try: ready(); time.sleep(30)
except BaseException: print("an error: no good", file=sys.stderr)
""",
    "native code": """
_signals.PATIENCE = 1.2
import ctypes
ready(); ctypes.CDLL(None).poll(None, 0, 30000); ctypes.CDLL(None).poll(None, 0, 30000)
""",
    "a thread that does not end": """
threading.Thread(target=time.sleep, args=(30,)).start()
ready(); time.sleep(30)
""",
    "threads that print when all goes down": """
def loud():
    time.sleep(0.3)
    raise RuntimeError("the other side is gone")
try:
    threading.Thread(target=loud).start(); ready(); time.sleep(30)
finally:
    os.write(2, b"native words\\n"); time.sleep(0.5)
""",
    "a program that it runs": """
import subprocess
try: subprocess.run([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(30)"])
finally: assert not os.path.exists("/nowhere")
""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_it_with_one_word(moment: str) -> None:
    number = signal.SIGTERM if moment in ("a destructor", "native code") else signal.SIGINT
    with started(MOMENTS[moment]) as process:
        process.send_signal(number)
        ended(process, number)


def test_a_closed_terminal_ends_it_too() -> None:
    with started("ready(); time.sleep(30)") as process:
        process.send_signal(signal.SIGHUP)
        ended(process, signal.SIGHUP)


def test_a_signal_while_modules_are_imported(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, time; os.write(1, b'ready\\n'); time.sleep(30)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "fossil_export", "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        ended(process, signal.SIGINT)


CLEANING = """
try: ready(); time.sleep(30)
finally: print("cleaning", flush=True); time.sleep({seconds}); print("clean", flush=True)
"""


def test_one_signal_that_comes_twice_does_not_disturb_cleaning_up() -> None:
    """`timeout`, `docker` and others pass on what the terminal sends by itself."""
    with started(CLEANING.format(seconds=0.5)) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said, words = process.communicate(timeout=25)
    assert (process.returncode, said, words) == (130, "cleaning\nclean\n", "Aborted!\n")


def test_a_second_signal_ends_cleaning_up_at_once() -> None:
    with started(CLEANING.format(seconds=30)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
        time.sleep(1.3)
        process.send_signal(signal.SIGINT)
        said, words = process.communicate(timeout=25)
    assert (process.returncode, said, words) == (130, "", "Aborted!\n")


def test_a_signal_after_the_result() -> None:
    """While Python takes itself apart: no traceback of its own."""
    with started("import atexit; atexit.register(lambda: (ready(), time.sleep(30)))") as process:
        process.send_signal(signal.SIGINT)
        ended(process, signal.SIGINT)


def test_signals_that_the_parent_ignores_stay_ignored() -> None:
    """As `nohup` does, and a shell without job control for what it starts with `&`."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    script = HARNESS.format(body="    ready(); time.sleep(0.3); print('done')")
    try:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=25)[0] == "done\n" and process.returncode == 0


def test_the_word_comes_after_the_caret_of_a_terminal() -> None:
    here, there = pty.openpty()
    script = HARNESS.format(body="    ready(); time.sleep(30)")
    with interruptible():
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=there)
    os.close(there)
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(25) == 130 and os.read(here, 100) == b"\r\nAborted!\r\n"
    os.close(here)


def test_a_forked_child_of_a_library_is_not_the_command() -> None:
    """Its pool is ended by a signal to the children, which once was one to the parent as well."""
    body = """
child = os.fork()
if not child: time.sleep(30); os._exit(9)
os.kill(child, 15); status = os.waitpid(child, 0)[1]
ready(); time.sleep(1.5); print(status)
"""
    with started(body) as process:
        said, words = process.communicate(timeout=25)
    assert (process.returncode, said, words) == (0, "15\n", "")


def test_closed_stdout_and_stderr_are_not_given_to_the_next_file(adapter: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m fossil_export merge {adapter} -o {tmp_path / 'merged'}"
    done = subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], timeout=60)
    assert done.returncode == 0 and (tmp_path / "merged" / "config.json").is_file()


def test_the_library_takes_no_signals(adapter: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in CODES], sys.unraisablehook
    from fossil_export import merge

    merge(adapter, tmp_path / "merged")
    assert ([signal.getsignal(number) for number in CODES], sys.unraisablehook) == before


# The program that GenAI's builder runs as

BUILDER = "import os, pathlib, time; pathlib.Path(os.environ['PID']).write_text(str(os.getpid())); time.sleep(60)"
BUILD = """
from pathlib import Path
from fossil_export.onnx.builders._genai import build
build(Path({model!r}), Path({output!r}), "fp32", "cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_builder_does_not_outlive_its_parent(number: int, base: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake" / "onnxruntime_genai"
    (fake / "models").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "models" / "__init__.py").touch()
    (fake / "models" / "builder.py").write_text(BUILDER)
    told = tmp_path / "pid"
    paths = f"{fake.parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    lines = BUILD.format(model=str(base), output=str(tmp_path / "output")).strip().splitlines()
    script = HARNESS.format(body="\n".join(f"    {line}" for line in lines))
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "PID": str(told)},
        )
    with process:
        while not told.exists() or not told.read_text():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(25)
        else:
            ended(process, number)
    child, end = Path("/proc") / told.read_text(), time.monotonic() + 25
    while child.exists() and "(zombie)" not in (child / "status").read_text() and time.monotonic() < end:
        time.sleep(0.01)
    assert not child.exists() or "(zombie)" in (child / "status").read_text()
    assert number == signal.SIGKILL or not list((tmp_path / "output").iterdir())
