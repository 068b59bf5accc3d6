"""What a merge of 8B to 1T takes on one machine and on many: planned for real, then computed from measured constants.

    python benchmarks/scale.py --write docs/scale.md

Bases are files of holes with the real names, shapes and file sizes, so that a base of 1 TB takes 30 MB of disk. Each is
planned in a process of its own, with all-linear adapters (LoRA r = 16, tile r = 64) and a LoRA on attention. From the
plan come bytes, elements and requests; small merges tell what an element and a copied GB cost (--size, --runs).
`--only 8B 405B` takes a part; `--json` keeps what was found, and `--from` makes the tables of it again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import common
from scaling import bases, costs
from scaling.constants import Constants, measured
from scaling.work import FileWork, planning_requests, work_of
from torture.__main__ import replace_part

ADAPTERS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "LoRA r = 16, all": ("lora", 16, ()),
    "tile r = 64, all": ("tile", 64, ()),
    "LoRA r = 16, attention": ("lora", 16, bases.ATTENTION),
}
WORKERS = (1, 8, 64)


@dataclass(frozen=True)
class Planned:
    """A plan: `seconds` of CPU, `memory` in bytes above the process's before and at its peak, `pickled` bytes,
    `tensors` stored in the base, `requests` to make it of a base that is elsewhere; and its work."""

    model: str
    adapter: str
    seconds: float
    memory: int
    peak: int
    pickled: int
    tensors: int
    requests: int
    adapter_bytes: int
    work: list[FileWork]

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Planned:
        return cls(**{**found, "work": [FileWork(**one) for one in found["work"]]})


def planned(model: str, adapter: str, folder: Path) -> Planned:
    """Plan the adapter in `folder` here; the memory is right in a process that did nothing else."""
    from fossil_export import plan_merge
    from fossil_export.merging._merge import peak_memory

    before, started = peak_memory(), time.process_time()
    plan = plan_merge(folder)
    seconds, peak = time.process_time() - started, peak_memory()
    base = plan.base.quantized.stored if plan.base.quantized is not None else plan.base
    stored = sum(len(header.tensors) for header in base.files)
    size = sum(file.stat().st_size for file in plan.adapter.files)
    requests, pickled = planning_requests(plan), len(pickle.dumps(plan))
    return Planned(model, adapter, seconds, peak - before, peak, pickled, stored, requests, size, work_of(plan))


def in_a_process(model: str, adapter: str, folder: Path) -> Planned:
    code = "import json, sys; from dataclasses import asdict; from pathlib import Path; import scale\n"
    code += "print(json.dumps(asdict(scale.planned(sys.argv[1], sys.argv[2], Path(sys.argv[3])))))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    # A process inherits the peak of the one that starts it, which is small here only if nothing large was made before.
    done = subprocess.run(
        [sys.executable, "-c", code, model, adapter, str(folder)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{model}, {adapter}: planning failed:\n{done.stderr}")
    return Planned.from_dict(json.loads(done.stdout.splitlines()[-1]))


def plans(names: list[str], work: Path) -> list[Planned]:
    found = []
    for name in names:
        shape = bases.MODELS[name]()
        base = bases.write_base(work / name, shape)
        for adapter, (method, rank, only) in ADAPTERS.items():
            folder = work / f"{name}-{method}-{rank}{'-'.join(['', *only])}"
            bases.write_adapter(folder, shape, base, method, rank, only)
            found.append(in_a_process(name, adapter, folder))
            common.say(f"{name}, {adapter}: planned in {found[-1].seconds:.1f} CPU-s")
    return found


def planning_table(found: list[Planned]) -> str:
    rows = []
    for one in found:
        rows.append(
            [
                one.model,
                one.adapter,
                f"{len(one.work)}",
                f"{one.tensors:,}",
                f"{one.seconds:.2f}",
                f"{one.memory / 1e6:.0f} MB",
                f"{one.memory / one.tensors / 1e3:.1f} kB",
                f"{one.pickled / 1e6:.1f} MB",
                f"{one.requests}",
            ]
        )
    columns = ["base", "adapter", "files", "tensors", "CPU-s", "memory", "a tensor", "pickled", "requests"]
    return common.table(columns, rows)


def work_table(found: list[Planned], constants: Constants) -> str:
    rows = []
    for one in found:
        total = Counter[str]()
        for file in one.work:
            total.update(file.elements)
        merged = sum(count for kind, count in total.items() if not kind.startswith(("decode", "cast")))
        read = sum(file.read + file.trained for file in one.work)
        written = sum(file.written for file in one.work)
        cpu = constants.seconds(dict(total), sum(file.copied for file in one.work))
        largest = max(file.written for file in one.work)
        rows.append(
            [
                one.model,
                one.adapter,
                f"{read / 1e9:,.0f} GB",
                f"{written / 1e9:,.0f} GB",
                f"{largest / 1e9:.1f} GB",
                f"{merged / 1e9:,.1f}",
                f"{cpu:,.0f}",
                f"{sum(file.ranges for file in one.work):,}",
                f"{sum(file.parts for file in one.work):,}",
            ]
        )
    columns = ["base", "adapter", "read", "written", "largest file", "merged, 10⁹ elements", "CPU-s", "GET", "PUT"]
    return common.table(columns, rows)


def time_table(found: list[Planned], constants: Constants, places: list[costs.Place], cores: int) -> str:
    """Of the first adapter of each base."""
    rows = []
    for one in found:
        if one.adapter != next(iter(ADAPTERS)):
            continue
        for workers in WORKERS:
            cells = []
            for place in places:
                made = costs.estimate(one.work, constants, place, workers, cores, one.seconds + constants.start)
                usable = workers == 1 or place.shared
                cells.append(f"{shown(made.seconds)}, {made.bound}" if usable else "")
            rows.append([one.model, workers, *cells])
    return common.table(["base", "workers", *(place.name for place in places)], rows)


def worker_table(found: list[Planned], constants: Constants) -> str:
    """Memory and disk of a worker, and how evenly files divide; of the first adapter of each base."""
    rows = []
    for one in found:
        if one.adapter != next(iter(ADAPTERS)):
            continue
        written = [float(file.written) for file in one.work]
        balances = []
        for workers in WORKERS[1:]:
            loads = [sum(written[number] for number in own) for own in costs.divided(written, workers)]
            balances.append(f"{sum(loads) / len(loads) / max(loads):.0%}")
        whole = sum(written) / 1e9
        memory = one.memory + constants.memory
        rows.append(
            [
                one.model,
                f"{memory / 1e6:,.0f} MB",
                f"{one.adapter_bytes / 1e9:.2f} GB",
                f"{whole:,.0f} GB",
                f"{min(len(written), 64)}",
                *balances,
            ]
        )
    columns = ["base", "memory", "disk, object store", "disk, folder (all together)", "busy of 64"]
    return common.table([*columns, *(f"balance, {count}" for count in WORKERS[1:])], rows)


def shown(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def page(found: list[Planned], constants: Constants, about: str, places: list[costs.Place], cores: int) -> str:
    parts = [
        about,
        "**Measured: what an element costs**",
        constants.table(),
        "**Measured: planning**",
        planning_table(found),
        "**Computed from the plans: the work**",
        work_table(found, constants),
        f"**Computed: time and what bounds it** ({next(iter(ADAPTERS))}; {cores} cores a worker)",
        time_table(found, constants, places, cores),
        f"**Computed: a worker's needs** ({next(iter(ADAPTERS))})",
        worker_table(found, constants),
    ]
    return "\n\n".join(parts)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=bases.MODELS, default=list(bases.MODELS), metavar="MODEL")
    parser.add_argument("--size", type=float, default=1.0, help="GB of the bases of the constants (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="of each merge of the constants (default 3)")
    parser.add_argument("--cores", type=int, default=16, help="of a worker (default 16)")
    parser.add_argument("--disk", type=float, default=2.5, metavar="GB", help="a second, of a local disk (2.5)")
    parser.add_argument(
        "--share", type=float, default=1.0, metavar="GB", help="a second, of a shared folder (default 1)"
    )
    parser.add_argument("--network", type=float, nargs="+", default=[10, 25, 100], metavar="GBIT", help="a second")
    parser.add_argument("--work", type=Path, default=common.WORK / "scale")
    parser.add_argument("--json", type=Path, help="keep what was measured here")
    parser.add_argument("--from", type=Path, dest="given", help="take it from there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this page")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    if options.given:
        kept = json.loads(options.given.read_text())
        found = [Planned.from_dict(one) for one in kept["plans"]]
        constants, about = Constants(**kept["constants"]), kept["about"]
    else:
        found = plans(options.only, options.work)
        constants = measured(options.work, options.size, options.runs)
        about = f"{date.today()}; {common.machine('numpy', 'ml_dtypes')}."
    if options.json:
        kept = {"about": about, "constants": asdict(constants), "plans": [asdict(one) for one in found]}
        common.write_json(options.json, kept)
    places = costs.places(options.disk * 1e9, options.share * 1e9, options.network)
    text = page(found, constants, about, places, options.cores)
    print(text)
    if options.write:
        replace_part(options.write, "scale", text, "scale")


if __name__ == "__main__":
    main()
