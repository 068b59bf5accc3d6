"""`verify` of a real model while other programs want the same cores, by this code and by an older checkout's.

    python benchmarks/loaded.py [--old CHECKOUT] [--busy 0 4] [--limit 300]

The rows take turns. Busy processes compute until the row ends. With Linux's autogroups a session counts as one, however
many processes it has: each busy process begins a session of its own, as the programs of other users do.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import smollm2
from common import machine

from fossil_export import merge

HERE = Path(__file__).parents[1]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute for as long as the block runs."""
    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def timed(model: Path, code: Path, limit: float) -> tuple[str, str]:
    """Seconds on the clock and of the CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, "-m", "fossil_export", "verify", str(model), "--level", "forward", "--json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code)}
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=limit, start_new_session=True)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s", "–"
    taken, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return f"{taken:.1f} s", f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout of an older version")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4], help="busy processes")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a row is given up")
    options = parser.parse_args()
    print(f"{machine()}; load before {os.getloadavg()[0]:.1f}\n")
    print("| busy processes | code | time | CPU |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        merge(smollm2.adapter(), model, base=smollm2.base_model())
        for count in options.busy:
            for name, code in {"this": HERE, **({"old": options.old.resolve()} if options.old else {})}.items():
                with busy(count):
                    taken, cpu = timed(model, code, options.limit)
                print(f"| {count} | {name} | {taken} | {cpu} |", flush=True)


if __name__ == "__main__":
    main()
