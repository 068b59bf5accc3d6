"""What each choice in the merge's data path is worth: the same merge with one of them changed at a time.

    python benchmarks/levers.py --size 6.4 --rounds 3

uses the base and the all-linear adapter of benchmarks/merge.py and prints medians as Markdown. Every run is
a process of its own, and the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

from fossil_export import merge
from fossil_export.checkpoints import _input as input_file
from fossil_export.merging import _engine as engine
from fossil_export.merging import _memory as memory
from fossil_export.merging import _run as run
from fossil_export.merging import _slabs as slabs
from fossil_export.merging import _worker as worker
from fossil_export.writing import _output as output


def patch(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def buffered_writes() -> None:
    patch(output, "_open_direct", lambda path: None)


def read_all() -> None:
    """Also what is copied goes through a buffer of the thread's own, aligned like the target."""

    def view(self: Any, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        room = np.frombuffer(mmap.mmap(-1, nbytes + 2 * output.ALIGNMENT), np.uint8)
        start = offset % output.ALIGNMENT
        self.read(offset, room[start : start + nbytes])
        return room[start : start + nbytes]

    patch(input_file.InputFile, "view", view)
    patch(input_file.InputFile, "release", lambda self, offset, nbytes: None)


def map_all() -> None:
    """What is computed on is looked at through the map too."""

    def read(self: Any, offset: int, out: np.ndarray[Any, Any]) -> None:
        out[:] = self.view(offset, len(out))
        self.release(offset, len(out))

    patch(input_file.InputFile, "read", read)


def copy_then_patch() -> None:
    """Copy whole files inside the kernel first, then write only the merged rows over them."""

    def write(self: Any, file: Any, path: Path, moved: Any = None) -> Any:
        base = file.tensors[0][0].source.path
        shutil.copyfile(base, path)
        return self.change(file, path, base)

    patch(run.Writer, "write", write)


def keep_mapped_pages() -> None:
    patch(input_file.InputFile, "release", lambda self, offset, nbytes: None)


def no_preallocation() -> None:
    patch(output, "_allocate", os.ftruncate)


def numpy_alone() -> None:
    os.environ["FOSSIL_EXPORT_KERNELS"] = "0"


def small_pages() -> None:
    patch(worker, "_memory", lambda nbytes: mmap.mmap(-1, nbytes))


VARIANTS: dict[str, Callable[[], None]] = {
    "as it is": lambda: None,
    "buffered writes, then fsync": buffered_writes,
    "read, not mapped, also what is copied": read_all,
    "mapped, and copied from there": map_all,
    "copy the file, then patch it": copy_then_patch,
    "mapped pages kept": keep_mapped_pages,
    "no preallocation": no_preallocation,
    "small pages for the buffers": small_pages,
    "NumPy alone, no compiled loops": numpy_alone,
    "PyTorch for the arithmetic": lambda: None,
    **{f"threads: {count}": partial(patch, memory, "THREADS", count) for count in (1, 2, 4, 8)},
    **{f"slab: {size} MB": partial(patch, slabs, "SLAB", size << 20) for size in (1, 4, 16, 32)},
    **{
        f"block: {2**power // 1024}k elements": partial(patch, engine.NumpyEngine, "block", 1 << power)
        for power in (14, 16, 20)
    },
}


def child(name: str, adapter: str, target: str) -> None:
    VARIANTS[name]()
    result = merge(adapter, target, device="cpu:0" if name.startswith("PyTorch") else "cpu")
    print(json.dumps({"peak": result.peak_memory}))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=6.4, help="of the base in GB, as made by benchmarks/merge.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of variants; all by default")
    parser.add_argument("--work", type=Path, default=common.WORK)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    names = options.only or list(VARIANTS)
    adapter, target = str(options.work / "all"), str(options.work / "output")
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for _, name in common.turns(dict.fromkeys(names, options.rounds)):
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        started = time.perf_counter()
        command = [sys.executable, __file__, "--child", name, adapter, target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        results[name].append((seconds, json.loads(done.stdout)["peak"]))
        common.say(f"{name}: {seconds:.2f} s")
    shutil.rmtree(target, ignore_errors=True)
    print(f"{options.size:g} GB; {common.machine('numpy')}\n")
    print(common.timings(results, names[0], "ratio"))


if __name__ == "__main__":
    main()
