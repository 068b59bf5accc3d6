"""LoRA merged by fossil-export, by PEFT and by axolotl's streaming merge: wall and CPU time, peak memory, in one run.

    python benchmarks/merge_lora.py --size 6.4 --runs 4 --peft 2 --axolotl 2 --axolotl-source ../axolotl/src

makes the base of merge.py, all-linear LoRAs of rank 8, 64 and 256 and the tile adapter of rank 64, and runs the
contestants in turn, each as a whole process, with a `sync` after those that make none. axolotl need not be installed:
of its source the one module that merges is imported, with a logger in the place of its own.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from pathlib import Path

import common
import merge

RANKS = (8, 64, 256)

AXOLOTL = """
import importlib.util, logging, sys, types
from pathlib import Path
source, base, adapter, target = sys.argv[1:]
for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
path = Path(source) / "axolotl" / "cli" / "utils" / "lora_merge.py"
spec = importlib.util.spec_from_file_location("lora_merge", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.merge_lora_sharded_efficient(base, adapter, target, device="cpu")
"""


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=6.4, help="of the base, in GB (default 6.4)")
    parser.add_argument("--runs", type=int, default=4, help="of fossil-export (default 4)")
    parser.add_argument("--peft", type=int, default=0, help="runs of PEFT (default 0: it needs twice the base in RAM)")
    parser.add_argument("--axolotl", type=int, default=0, help="runs of axolotl (default 0)")
    parser.add_argument("--axolotl-source", help="its folder src")
    parser.add_argument("--work", type=Path, default=common.WORK)
    options = parser.parse_args()
    work: Path = options.work
    base, output = work / f"base-{options.size:g}", str(work / "output")
    layers = merge.make_base(base, options.size)
    targets = [name.rpartition(".")[2] for name in merge.LINEARS]
    merge.make_adapter(work / "all", base, layers, targets)
    for rank in RANKS:
        merge.make_adapter(work / f"lora-{rank}", base, layers, targets, lora=rank)

    tool = [sys.executable, "-m", "fossil_export", "merge"]
    mine = {f"fossil-export, LoRA r = {rank}": [*tool, str(work / f"lora-{rank}"), "-o", output] for rank in RANKS}
    other = str(work / "lora-64")
    commands = {
        "fossil-export, tile r = 64": [*tool, str(work / "all"), "-o", output],
        **mine,
        "PEFT, LoRA r = 64": merge.peft_merge("save_pretrained", str(base), other, output),
        "axolotl, LoRA r = 64": [sys.executable, "-c", AXOLOTL, str(options.axolotl_source), str(base), other, output],
    }
    counts = {"PEFT": options.peft, "axol": options.axolotl if options.axolotl_source else 0}
    runs = {name: counts.get(name[:4], options.runs) for name in commands}
    results: dict[str, list[tuple[float, int, float]]] = {}
    for _, name in common.turns(runs):
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        results.setdefault(name, []).append(common.spent(commands[name], sync=not name.startswith("fossil")))
        wall, peak, cpu = results[name][-1]
        common.say(f"{name}: {wall:.2f} s, {cpu:.2f} CPU-s, {peak / 1e6:.0f} MB")
    shutil.rmtree(output, ignore_errors=True)

    reference = statistics.median(wall for wall, _, _ in next(iter(results.values())))
    rows = []
    for name, found in results.items():
        wall = statistics.median(one[0] for one in found)
        every = " ".join(f"{one[0]:.1f}" for one in found)
        cpu = statistics.median(one[2] for one in found)
        peak = max(one[1] for one in found)
        rows.append([name, f"{wall:.2f}", every, f"{wall / reference:.2f}×", f"{cpu:.1f}", f"{peak / 1e6:.0f} MB"])
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"{size / 1e9:.2f} GB; {common.machine('numpy', 'torch', 'peft')}\n")
    print(common.table(["", "seconds (median)", "all runs", "against tile", "CPU-s (median)", "peak memory"], rows))


if __name__ == "__main__":
    main()
