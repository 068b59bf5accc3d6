"""What the benchmarks have in common: options, the machine, turns, whole processes, tables, files of results.

Needs the standard library alone, since gpu_parity.py names what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

WORK = Path(tempfile.gettempdir()) / "fossil-export-benchmark"
"""Where the bases and adapters of merge.py, hub.py and levers.py stay."""

# A process inherits the peak of the one that starts it, so a small one starts and measures each contestant.
LAUNCHER = """
import os, sys
process = os.fork()
if process == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(process, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def parser(description: str | None) -> argparse.ArgumentParser:
    """For a script whose docstring is its description."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def say(text: str) -> None:
    """A line about the run, beside its result."""
    print(text, file=sys.stderr, flush=True)


def machine(*modules: str) -> str:
    """The machine, fossil-export's version, Python's, and those of the packages that `modules` belong to."""
    from fossil_export import __version__

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    packages = packages_distributions() if modules else {}
    names = [packages[module][0] for module in modules if module in packages]
    parts = [f"{cpu}, {os.cpu_count()} cores", f"{platform.system()} {platform.release()} {platform.machine()}"]
    parts += [f"fossil-export {__version__}", f"Python {platform.python_version()}"]
    return "; ".join([*parts, *(f"{name} {version(name)}" for name in names)])


def turns(runs: Mapping[str, int], shuffle: bool = False) -> Iterator[tuple[int, str]]:
    """(round, name) of contestants that take turns, each in as many of the first rounds as it has runs.

    A round goes in the order of `runs`, or each in another one.
    """
    for number in range(max(runs.values(), default=0)):
        names = [name for name, count in runs.items() if number < count]
        for name in random.sample(names, len(names)) if shuffle else names:
            yield number, name


def measure(command: Sequence[str], sync: bool = False, env: Mapping[str, str] | None = None) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a whole process, with a `sync` after it if asked."""
    wall, peak, _ = spent(command, sync, env)
    return wall, peak


def spent(command: Sequence[str], sync: bool = False, env: Mapping[str, str] | None = None) -> tuple[float, int, float]:
    """The same, and the seconds of its CPU time."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], env=env, capture_output=True, text=True)
    if sync:
        os.sync()
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr}")
    cpu, peak = done.stdout.split()[-2:]
    return seconds, int(peak) * 1024, float(cpu)


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(columns: Sequence[str]) -> str:
    """The two lines that a Markdown table begins with."""
    return f"{row(columns)}\n{'|---' * len(columns)}|"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, without a newline at its end."""
    return "\n".join([header(columns), *map(row, rows)])


def timings(runs: Mapping[str, Sequence[tuple[float, int]]], reference: str, against: str) -> str:
    """The table of what `measure` gave; `against` is the title of the ratios to the median of `reference`."""
    seconds = {name: [spent for spent, _ in values] for name, values in runs.items()}
    middle = medians(seconds)
    rows = []
    for name, values in runs.items():
        ratio = f"{middle[name] / middle[reference]:.2f}×" if reference in middle else "-"
        every = " ".join(f"{spent:.1f}" for spent in seconds[name])
        rows.append([name, f"{middle[name]:.2f}", every, ratio, f"{max(peak for _, peak in values) / 1e6:.0f} MB"])
    return table(["", "seconds (median)", "all runs", against, "peak memory"], rows)


def publish(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    publish(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
