"""What could widen, add a repeated update, round and look for infinities: C, NumPy, PyTorch, numba, numexpr.

    python benchmarks/compiled.py --rounds 20

takes slabs of 8 MB with a tile update (r = 64), each contestant in a process and a thread of its own, and prints as
Markdown: ns of CPU time an element; how much longer a slab takes while a second thread works on another one (1 if
neither waits for the interpreter's lock, on two free cores); CPU seconds until the first slab is done (imports and
compilation); what it takes on disk. All give the same bytes, or the run ends. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, ROWS, RANK = 4096, {"BF16": 1024, "F16": 1024, "F32": 512}, 64

Array = Any
Merge = Callable[[Array, Array, Array], bool]
"""From rows, D (r, out) and memory for the result to whether it is finite."""


def ours(dtype: str) -> Merge:
    from fossil_export.merging._engine import NumpyEngine, Update, merge_slab
    from fossil_export.methods import METHODS

    def merge(rows: Array, shard: Array, out: Array) -> bool:
        return merge_slab(NumpyEngine(), rows, out, [Update(METHODS["tile"], {"D": shard}, {})], 0, 1 << 40)[1]

    return merge


def pytorch(dtype: str) -> Merge:
    import torch

    torch.set_num_threads(1)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]

    def tensor(array: Array) -> Any:
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(kind)

    def merge(rows: Array, shard: Array, out: Array) -> bool:
        own = torch.from_numpy(shard).T.contiguous()
        for first in range(0, len(rows), 128):
            wide = tensor(rows[first : first + 128]).to(torch.float32, copy=True)
            wide.view(len(wide), -1, RANK).add_(own[first : first + 128, None, :])
            tensor(out[first : first + 128]).copy_(wide)
        return bool(torch.isfinite(tensor(out)).all())

    return merge


def by_numba(dtype: str) -> Merge | None:
    import numba
    import numpy as np

    if dtype == "F16":
        return None

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def loop(rows: Array, shard: Array, out: Array) -> bool:
        count, width = rows.shape
        rank = len(shard)
        bits = np.empty(width, np.uint32)
        wide = bits.view(np.float32)
        own = np.empty(rank, np.float32)
        bad = np.uint32(0)
        for row in range(count):
            for column in range(rank):
                own[column] = shard[column, row]
            for column in range(width):
                bits[column] = np.uint32(rows[row, column]) << np.uint32(16)
            for first in range(0, width, rank):
                for column in range(rank):
                    wide[first + column] += own[column]
            for column in range(width):
                one = bits[column]
                bad |= (one & np.uint32(0x7FFFFFFF)) + np.uint32(0x00808000)
                odd = (one >> np.uint32(16)) & np.uint32(1)
                out[row, column] = np.uint16((one + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        finite: bool = (bad >> np.uint32(31)) == 0
        return finite

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def loop_wide(rows: Array, shard: Array, out: Array) -> bool:
        count, width = rows.shape
        rank = len(shard)
        own = np.empty(rank, np.float32)
        finite = True
        for row in range(count):
            for column in range(rank):
                own[column] = shard[column, row]
            for first in range(0, width, rank):
                for column in range(rank):
                    value = rows[row, first + column] + own[column]
                    finite &= abs(value) <= np.float32(3.4028235e38)
                    out[row, first + column] = value
        return finite

    if dtype == "F32":
        return lambda rows, shard, out: bool(loop_wide(rows, shard, out))
    return lambda rows, shard, out: bool(loop(rows.view(np.uint16), shard, out.view(np.uint16)))


def by_numexpr(dtype: str) -> Merge | None:
    import numexpr
    import numpy as np

    if dtype == "F16":
        return None
    numexpr.set_num_threads(1)

    def merge(rows: Array, shard: Array, out: Array) -> bool:
        from fossil_export.merging._engine import is_finite

        own = np.ascontiguousarray(shard.T)[:, None, :]
        for first in range(0, len(rows), 128):
            part = rows[first : first + 128]
            if dtype == "BF16":
                halves = part.view(np.uint16).astype(np.int32)
                part = numexpr.evaluate("halves << 16", {"halves": halves}).view(np.float32)
            operands = {"part": part.reshape(len(part), -1, RANK), "add": own[first : first + 128]}
            bits = numexpr.evaluate("part + add", operands).view(np.int32).reshape(len(part), -1)
            if dtype == "BF16":
                narrow = "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16"
                bits = numexpr.evaluate(narrow, {"bits": bits}).astype(np.int16)
            out[first : first + 128] = bits.view(out.dtype)
        return is_finite(out)

    return merge


CONTESTANTS: dict[str, tuple[Callable[[str], Merge | None], tuple[str, ...]]] = {
    "C (kernels.c)": (ours, ()),
    "NumPy, ml_dtypes": (ours, ("numpy", "ml_dtypes")),
    "PyTorch": (pytorch, ("torch",)),
    "numba": (by_numba, ("numba", "llvmlite")),
    "numexpr": (by_numexpr, ("numexpr",)),
}


def child(name: str, dtype: str, rounds: int) -> None:
    before = time.process_time()
    make = CONTESTANTS[name][0](dtype)
    loading = time.process_time() - before
    if make is None:
        print("null")
        return
    import zlib

    import numpy as np

    from fossil_export.checkpoints._dtypes import numpy_dtype

    rng = np.random.default_rng(0)
    shape = ROWS[dtype], WIDTH
    rows = rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype))
    shard = rng.standard_normal((RANK, shape[0]), np.float32) * np.float32(1e-2)
    outs = [np.zeros_like(rows) for _ in range(2)]
    before = time.process_time()
    assert make(rows, shard, outs[0])
    first = time.process_time() - before
    alone, cpu = timed(lambda: make(rows, shard, outs[0]), rounds)
    halt = threading.Event()

    def beside() -> None:
        while not halt.is_set():
            make(rows, shard, outs[1])

    other = threading.Thread(target=beside)
    other.start()
    together, _ = timed(lambda: make(rows, shard, outs[0]), rounds)
    halt.set()
    other.join()
    result = {
        "ns": cpu / rows.size * 1e9,
        "beside": together / alone,
        "start": loading + first - cpu,
        "bytes": zlib.crc32(outs[0].view(np.uint8).data),
    }
    print(json.dumps(result))


def timed(call: Callable[[], bool], rounds: int) -> tuple[float, float]:
    """Medians of wall and CPU seconds of this thread."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.thread_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.thread_time() - cpu)
    return sorted(walls)[rounds // 2], sorted(cpus)[rounds // 2]


def room(packages: tuple[str, ...]) -> str:
    """What packages take on disk, without those that they need."""
    total = 0
    for package in packages:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            total += sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    if not packages:
        from fossil_export import kernels

        total = sum(path.stat().st_size for path in Path(kernels.__file__).parent.glob("*.so"))
    return f"{total / 1e6:.3g} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, dtype = options.child
        child(name, dtype, options.rounds)
        return
    print("| | bf16 ns | fp16 ns | fp32 ns | beside a second | until the first slab, CPU s | on disk |")
    print("|---|---|---|---|---|---|---|")
    checks: dict[str, int] = {}
    for name, (_, packages) in CONTESTANTS.items():
        if any(importlib.util.find_spec(package) is None for package in packages):
            print(f"| {name} | not installed | | | | | |")
            continue
        found: dict[str, Any] = {}
        for dtype in ROWS:
            command = [sys.executable, __file__, "--child", name, dtype, "--rounds", str(options.rounds)]
            environment = {**os.environ, "FOSSIL_EXPORT_KERNELS": "1" if name.startswith("C ") else "0"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[dtype] = json.loads(done.stdout)
            if found[dtype] and checks.setdefault(dtype, found[dtype]["bytes"]) != found[dtype]["bytes"]:
                sys.exit(f"{name}: other bytes in {dtype}")
        cells = [f"{one['ns']:.2f}" if one else "—" for one in found.values()]
        first = found["BF16"]
        print(f"| {name} | {' | '.join(cells)} | {first['beside']:.2f}× | {first['start']:.2f} | {room(packages)} |")


if __name__ == "__main__":
    main()
