"""A FOSSIL adapter to a LoRA: fossil-export against PEFT's `save_as_lora`, whole processes in turn.

    python benchmarks/convert.py --rounds 3

The real model's adapter (all-linear, r = 64; examples/smollm2.py). Prints medians, peak memory and the largest
difference of the update B A from the trained one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2
from safetensors.numpy import load_file

PEAK = """
import json, time
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({{"seconds": seconds, "work": seconds - {imports}, "peak": peak}}))
"""

OURS = """
import sys, time
before = time.perf_counter()
from fossil_export import convert
import fossil_export.converting._lora
imports = time.perf_counter() - before
convert(sys.argv[1], sys.argv[3], to="lora", base=sys.argv[2])
"""

PEFTS = """
import sys, time
before = time.perf_counter()
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForCausalLM
imports = time.perf_counter() - before
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[1])
save_as_lora(sys.argv[3], model, rank=64)
"""


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    adapter, base = smollm2.adapter(), smollm2.base_model()
    contestants = {"fossil-export": OURS, "PEFT save_as_lora": PEFTS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    errors = {}
    with tempfile.TemporaryDirectory() as temporary:
        for _, name in common.turns(dict.fromkeys(contestants, options.rounds)):
            output = Path(temporary) / "lora"
            shutil.rmtree(output, ignore_errors=True)
            code = PEAK.format(work=contestants[name], imports="imports")
            command = [sys.executable, "-c", code, str(adapter), str(base), str(output)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            errors[name] = _error(adapter, output)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"adapter {size / 1e6:.1f} MB, rounds {options.rounds}; {common.machine('numpy', 'peft', 'torch')}\n")
    rows = []
    for name, found in runs.items():
        seconds, work, peak = (statistics.median(run[key] for run in found) for key in ("seconds", "work", "peak"))
        rows.append([name, f"{seconds:.2f} s", f"{work:.2f} s", f"{peak / 1e6:.0f} MB", f"{errors[name]:.1e}"])
    columns = ["", "whole process", "without imports", "peak memory", "error of the update"]
    print(common.table(columns, rows))


def _error(adapter: Path, lora: Path) -> float:
    """The largest relative error of B A against the tiled shard, over all modules."""
    shards, found = load_file(adapter / "adapter_model.safetensors"), load_file(lora / "adapter_model.safetensors")
    worst = 0.0
    for name, shard in shards.items():
        stem = name.removesuffix(".miss_block")
        first, second = (found[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        wanted = shard.T[:, np.arange(first.shape[1]) % len(shard)].astype(np.float64)
        worst = max(worst, float(np.linalg.norm(second @ first - wanted) / np.linalg.norm(wanted)))
    return worst


if __name__ == "__main__":
    main()
