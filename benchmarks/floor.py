"""Merges against the floor of the disk: `dd` of the base's files past the page cache, four at once, in the same run.

    python benchmarks/floor.py --size 6.4 --runs 3 --work /where/the/bases/stay

makes random Llama-3.2-3B-shaped bases in four files (bfloat16 and float16 of --size GB, float32 of half of that), and
adapters of r = 64: tile, mini, LoRA and bat on all linear weights, tile on q and v. Contestants take turns, each as a
whole process, merges with the compiled loops and without:

- the floor: `dd bs=8M oflag=direct`, which reads through the page cache, one process a file, all four at once;
- `cp -r` with `sync`, and PEFT if asked (--peft);
- `verify --level weights` of the tile merge, against both models' files read once by `dd bs=8M`, eight processes at
  once. The result's pages are dropped before each of these, as a merge leaves them.

CPU seconds are user and system time of all processes, the peak is that of the largest. The bases stay in --work: 22 GB
with an output at the usual size, 13 with --drop, which removes each when its runs are over. --dtypes and --only take a
part. Prints Markdown: medians, all runs, ratios. What memory does with rank and size is measured by flat.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import common
import merge

FLOOR = "dd, direct, 4 at once"
READ = "dd, base and result read"
VERIFY = "verify, weights"
BOUNDS = {"tile": 1.15, "mini": 1.15, "q,v": 1.15, "LoRA": 1.3, "bat": 1.3}
"""How many times the floor a merge may take."""


@dataclass(frozen=True)
class Contestant:
    """A command; `after` the result of the contestant before it, which it reads; with a `sync` of its own."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    after: bool = False
    sync: bool = False
    of: str = FLOOR


def at_once(commands: list[str]) -> list[str]:
    """Commands of a shell that run at the same time; fails if one of them does."""
    lines = [f'{command} & all="$all $!"' for command in commands]
    return ["sh", "-c", "\n".join([*lines, "for one in $all; do wait $one || exit 1; done"])]


def floor(base: Path, output: Path) -> list[str]:
    """A copy of the weights past the page cache."""
    files = sorted(base.glob("*.safetensors"))
    copies = [
        f"dd if={shlex.quote(str(file))} of={shlex.quote(str(output / file.name))} bs=8M oflag=direct status=none"
        for file in files
    ]
    made = at_once(copies)
    return [*made[:2], f"mkdir -p {shlex.quote(str(output))}\n{made[2]}"]


def reading(*folders: Path) -> list[str]:
    """Both models' files read once, to nowhere."""
    names = [f"{shlex.quote(str(folder))}/model-0000{number}-*" for folder in folders for number in range(1, 5)]
    return at_once([f"dd if=$(echo {name}) of=/dev/null bs=8M status=none" for name in names])


def contestants(work: Path, base: Path, layers: int, peft: bool) -> dict[str, Contestant]:
    """By name, in the order of a round."""
    targets = [name.rpartition(".")[2] for name in merge.LINEARS]
    output = work / "output"
    tool = [sys.executable, "-m", "fossil_export"]
    without = {"FOSSIL_EXPORT_KERNELS": "0"}
    found = {
        FLOOR: Contestant(floor(base, output)),
        "cp -r, sync": Contestant(["cp", "-r", str(base), str(output)], sync=True),
    }
    adapters: dict[str, dict[str, object]] = {
        "tile": {},
        "mini": {"variant": "mini"},
        "LoRA": {"lora": 64},
        "bat": {"variant": "bat"},
        "q,v": {"targets": ["q_proj", "v_proj"]},
    }
    for name, given in adapters.items():
        folder = work / f"{re.sub('[^a-z]', '', name.lower())}-{layers}"
        options = {"targets": targets, **given}
        if not (folder / "adapter_config.json").exists():
            merge.make_adapter(folder, base, layers, **options)  # type: ignore[arg-type]
        command = [*tool, "merge", str(folder), "--base", str(base), "-o", str(output)]
        found[name] = Contestant(command)
        found[f"{name}, without kernels"] = Contestant(command, without)
        if name == "tile":
            check = [*tool, "verify", str(output), "--level", "weights"]
            # The last of a name's runs: what it reads is there until the next contestant writes.
            found[READ] = Contestant(reading(base, output), after=True, of=READ)
            found[VERIFY] = Contestant(check, after=True, of=READ)
            found[f"{VERIFY}, without kernels"] = Contestant(check, without, after=True, of=READ)
    if peft:
        saved = merge.peft_merge("save_pretrained", str(base), str(work / f"tile-{layers}"), str(output))
        found["PEFT, tile"] = Contestant(saved, sync=True)
    return found


def run(one: Contestant, output: Path) -> tuple[float, int, float]:
    """Wall seconds, peak bytes of the largest process, CPU seconds."""
    if not one.after:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    if one.after:
        forget(output)
    return common.spent(one.command, sync=one.sync, env={**os.environ, **one.env})


def forget(folder: Path) -> None:
    """Drop the pages of a model's files, if the system can, so that who reads them first is not the slowest."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def report(found: Mapping[str, list[tuple[float, int, float]]], known: Mapping[str, Contestant]) -> str:
    middle = {name: statistics.median(wall for wall, _, _ in runs) for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        ratio = f"{middle[name] / middle[known[name].of]:.2f}×" if known[name].of in middle else ""
        bound = BOUNDS.get(name) or (1.3 if name == VERIFY else None)
        every = " ".join(f"{wall:.1f}" for wall, _, _ in runs)
        cpu = statistics.median(cpu for _, _, cpu in runs)
        peak = max(peak for _, peak, _ in runs)
        cells = [f"{middle[name]:.2f}", every, ratio, f"{bound:g}×" if bound else "", f"{cpu:.1f}"]
        rows.append([name, *cells, f"{peak / 1e6:.0f} MB"])
    columns = ["", "seconds (median)", "all runs", "against the floor", "at most", "CPU-s", "peak memory"]
    return common.table(columns, rows)


def size_of(dtype: str, gigabytes: float) -> float:
    """float32 of half the size has a quarter of the elements, and leaves room for the output."""
    return gigabytes / 2 if dtype == "float32" else gigabytes


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=6.4, help="of the base, in GB (default 6.4)")
    parser.add_argument("--runs", type=int, default=3, help="of each contestant (default 3)")
    parser.add_argument("--peft", type=int, default=0, help="runs of PEFT (default 0: it needs twice the base in RAM)")
    parser.add_argument("--dtypes", nargs="+", choices=merge.DTYPES, default=list(merge.DTYPES))
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants, beside the floor")
    parser.add_argument("--drop", action="store_true", help="remove each base when its runs are over")
    parser.add_argument("--work", type=Path, default=common.WORK / "floor")
    options = parser.parse_args(argv)
    work: Path = options.work
    output = work / "output"
    print(f"{date.today()}; {common.machine('numpy', 'ml_dtypes', 'torch', 'peft')}\n")
    print(f"{subprocess.run(['dd', '--version'], capture_output=True, text=True).stdout.splitlines()[0]}; {kernels()}.")
    for dtype in options.dtypes:
        size = size_of(dtype, options.size)
        base = work / f"base-{size:g}-{dtype}"
        layers = merge.make_base(base, size, dtype)
        known = contestants(work, base, layers, options.peft > 0 and dtype == "bfloat16")
        wanted = [name for name, one in known.items() if name in (FLOOR, READ) or re.search(options.only, name)]
        if any(known[name].after and name != READ for name in wanted):
            wanted = [name for name in known if name in wanted or name == "tile"]
        else:
            wanted = [name for name in wanted if name != READ]
        counts = {name: options.peft if name.startswith("PEFT") else options.runs for name in wanted}
        common.spent(reading(base))  # into the page cache, if it fits
        found: dict[str, list[tuple[float, int, float]]] = {}
        for _, name in common.turns(counts):
            found.setdefault(name, []).append(run(known[name], output))
            wall, peak, cpu = found[name][-1]
            common.say(f"{dtype}, {name}: {wall:.2f} s, {cpu:.2f} CPU-s, {peak / 1e6:.0f} MB")
        shutil.rmtree(output, ignore_errors=True)
        total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        print(f"\n**{dtype}, {total / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} files**\n")
        print(report(found, known), flush=True)
        if options.drop:
            shutil.rmtree(base)


def kernels() -> str:
    from fossil_export.kernels import library

    return "compiled loops are there" if library() is not None else "no compiled loops: both rows of a merge are NumPy"


if __name__ == "__main__":
    main()
