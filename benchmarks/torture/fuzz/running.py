"""Attempts in processes of their own: forked from one that has the libraries, with bounds on time and memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.subject import Subject, Unjudged
from torture.kinds import Options
from torture.rows import Row
from torture.workers import in_workers

SECONDS = 10.0
MEMORY = 1 << 30
PATIENCE = 30.0  # for the judge
WAITED = 6
ENDINGS = ("error: ", "not the trained model: ")
SPOKEN = re.compile(r"warning: |note: |\[ *\d+\.\d\d s\] ")
"""What may come before: the last one is how lines of --verbose begin."""


def attempts(subjects: list[Subject], options: Options, report: Callable[[Row], None]) -> None:
    """`options.count` attempts, the subjects in turn; each attempt is told by its subject and its seed alone."""
    wanted = [
        (number % len(subjects), options.seed + number // len(subjects))
        for number in range(options.count)
        if (subjects[number % len(subjects)].name, "", options.seed + number // len(subjects)) not in options.done
    ]
    names = [one.name for one in subjects]
    shares = [wanted[first :: options.jobs] for first in range(options.jobs)]
    in_workers(_serve, [(names, share, options.seconds) for share in shares if share], report)


def _serve(names: list[str], wanted: list[tuple[int, int]], seconds: float, rows: Any) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    preload()
    from torture.fuzz import subjects

    known = {one.name: one for one in subjects()}
    end = time.time() + seconds  # without the start
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory, ignore_cleanup_errors=True) as work:
        for number, seed in wanted:
            if time.time() > end:
                break
            rows.put(attempt(known[names[number]], seed, Path(work)))


def preload() -> None:
    """Import once what each attempt would import anew."""
    from fossil_export._libraries import tame_bitsandbytes

    tame_bitsandbytes()
    import peft  # noqa: F401
    import torch
    import transformers

    import fossil_export.cli
    import fossil_export.merging  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def attempt(subject: Subject, seed: int, work: Path) -> Row:
    """Damage, command, verdict, in a folder of `work`, which is removed."""
    sound = work / subject.name.replace("/", "-")
    if not sound.is_dir():
        subject.make(sound)
    folder = work / "attempt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, symlinks=True)
    random = Random(f"{subject.name} {seed}")
    how = subject.mutate(folder, random)
    command = subject.command(folder, random)
    outcome, detail = outcome_of(command, folder, work)
    if outcome == "right":
        outcome, detail = verdict(subject, folder, work)
    shutil.rmtree(folder, ignore_errors=True)
    shown = " ".join(command).replace(str(folder), "…")
    return Row("fuzz", subject.name, "", seed, outcome, f"{how} | {shown} | {detail}"[:2000])


def outcome_of(command: list[str], folder: Path, work: Path) -> tuple[str, str]:
    """How the command ended, and its words. "right" stands for one that ended well and is still to be judged."""
    before = set(folder.iterdir())
    printed = (work / "stdout", work / "stderr")
    status, seconds, grown = _forked(lambda: _command(command), printed, SECONDS)
    words = printed[1].read_text(errors="replace")
    everything = printed[0].read_text(errors="replace") + words
    if seconds >= SECONDS:
        return "slow", f"{seconds:.1f} s {words[-300:]}"
    if grown > MEMORY or "MemoryError" in words:
        return "memory", f"{grown / 1e6:.0f} MB {words[-300:]}"
    if status < 0:
        return "signal", f"{signal.Signals(-status).name} {words[-300:]}"
    if "Traceback (most recent call last)" in words:
        return "traceback", words[-1500:]
    if any(not one.isprintable() and one != "\n" for one in everything):
        return "control", words[-300:]
    lines = words.splitlines()
    if status == 2:
        return "refused", lines[-1] if lines else ""
    said = [line for line in lines if not SPOKEN.match(line)]
    if status == 0:
        return ("chatter", words[-600:]) if said else ("right", "")
    if not said and command[0] == "inspect":  # its table says why nothing can be merged
        return "refused", "inspect"
    if len(said) != 1 or not said[0].startswith(ENDINGS) or lines[-1] != said[0]:
        return "chatter", words[-600:]
    if left := set(folder.iterdir()) - before:
        return "left", f"{sorted(path.name for path in left)} {said[0]}"
    return "refused", said[0]


def verdict(subject: Subject, folder: Path, work: Path) -> tuple[str, str]:
    """What the judge says of a result."""
    printed = (work / "verdict", work / "stderr")

    def judge() -> int:
        try:
            problem = subject.judge(folder)
        except Unjudged as reason:
            print(reason)
            return 3
        print(problem or "")
        return int(problem is not None)

    status, seconds, _ = _forked(judge, printed, PATIENCE)
    words = printed[0].read_text(errors="replace").strip()
    if status in (0, 1, 3):
        return {0: "right", 1: "wrong", 3: "unjudged"}[status], words[:1500]
    return "unjudged", f"the judge ended with {status} after {seconds:.0f} s: {printed[1].read_text()[-800:]}"


def _command(arguments: list[str]) -> int:
    from fossil_export.cli import main

    try:
        main(arguments, prog_name="fossil-export")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _forked(work: Callable[[], int], printed: tuple[Path, Path], patience: float) -> tuple[int, float, int]:
    """Exit code (or minus the signal), seconds, and the bytes that the process grew by at most.

    The seconds are those of the processor, so that a busy machine does not count; one that waits for nothing is ended
    after some times as many of the clock.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(work, printed)
    while time.monotonic() - began < WAITED * patience:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code, usage.ru_utime + usage.ru_stime, _grown(printed[1])
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.wait4(child, 0)
    return -signal.SIGKILL, time.monotonic() - began, 0


def _in_child(work: Callable[[], int], printed: tuple[Path, Path]) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        for number, path in zip((1, 2), printed, strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, number)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        begun = _memory("VmRSS")
        limit = _memory("VmData") + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        printed[1].with_suffix(".grown").write_text(str(_memory("VmHWM") - begun))
    finally:
        os._exit(code)


def _grown(printed: Path) -> int:
    path = printed.with_suffix(".grown")
    grown = int(path.read_text()) if path.is_file() else 0
    path.unlink(missing_ok=True)
    return grown


def _memory(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024
