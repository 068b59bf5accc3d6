"""The weights check against reading both files once: wall and CPU time, as ratios in one run, and peak memory.

    python benchmarks/verify_floor.py --size 6.4 --rounds 5

makes the base of merge.py and an adapter of each case, merges it, and lets the check (a whole process) and the floor
take turns: `dd` of all files of base and artifact to /dev/null, four at once. Both read from the page cache if it has
room. --cases takes a part ("tile bfloat16"), --kernels 0 measures NumPy alone. Prints medians, ratios and all runs as
Markdown.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import common
import merge
import numpy as np

from fossil_export.checkpoints._header import encode_header

READERS = 4
RANK = 64
DTYPES = ("bfloat16", "float16", "float32")

Shapes = Callable[[int, int], dict[str, tuple[int, ...]]]

KINDS: dict[str, tuple[dict[str, object], Shapes]] = {
    "tile": ({"init_weights": True}, lambda out, width: {"miss_block": (RANK, out)}),
    "q,v": ({"init_weights": True}, lambda out, width: {"miss_block": (RANK, out)}),
    "mini": ({"init_weights": "mini", "mini_r": RANK}, lambda out, width: {"miss_block": (RANK, RANK)}),
    "bat": ({"init_weights": "bat"}, lambda out, width: {"miss_block": (out // RANK, RANK, RANK)}),
    "lora": (
        {"peft_type": "LORA", "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "fan_in_fan_out": False},
        lambda out, width: {"lora_A.weight": (RANK, width), "lora_B.weight": (out, RANK)},
    ),
}


def make_adapter(folder: Path, base: Path, layers: int, kind: str) -> None:
    """Random float32 values, as PEFT saves them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    fields, shapes = KINDS[kind]
    names = ["q_proj", "v_proj"] if kind == "q,v" else [name.rpartition(".")[2] for name in merge.LINEARS]
    tensors = [
        (f"base_model.model.model.layers.{layer}.{name}.{ending}", shape)
        for layer in range(layers)
        for name, (out, width) in merge.LINEARS.items()
        if name.rpartition(".")[2] in names
        for ending, shape in shapes(out, width).items()
    ]
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(encode_header([(name, "F32", shape) for name, shape in tensors], {"format": "pt"}))
        for _, shape in tensors:
            stream.write((rng.standard_normal(shape, np.float32) * 1e-3).tobytes())
    config = {
        "peft_type": "MISS",
        "r": RANK,
        "mini_r": 1,
        "target_modules": names,
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "bias": "none",
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def reading(folders: list[Path]) -> list[str]:
    """A command that reads all their weights once."""
    files = [str(file) for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    each = "dd if={} of=/dev/null bs=1M status=none"
    return ["sh", "-c", f"printf '%s\\n' {shlex.join(files)} | xargs -P {READERS} -I {{}} {each}"]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=6.4, help="of the base, in GB (default 6.4)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--cases", nargs="*", help="of all, those that begin with one of these")
    parser.add_argument("--kernels", default="1", help="0: NumPy alone")
    parser.add_argument("--work", type=Path, default=common.WORK)
    options = parser.parse_args()
    work: Path = options.work
    base = work / f"base-{options.size:g}"
    layers = merge.make_base(base, options.size)
    env = {**os.environ, "FOSSIL_EXPORT_KERNELS": options.kernels}
    rows = []
    for kind in KINDS:
        for dtype in DTYPES:
            case = f"{kind} {dtype}"
            if options.cases and not case.startswith(tuple(options.cases)):
                continue
            adapter, output = work / "floor-adapter", work / "floor-output"
            make_adapter(adapter, base, layers, kind)
            shutil.rmtree(output, ignore_errors=True)
            tool = [sys.executable, "-m", "fossil_export"]
            common.measure([*tool, "merge", str(adapter), "--dtype", dtype, "--output", str(output)], sync=True)
            contestants = {
                "floor": reading([base, output]),
                "check": [*tool, "verify", str(output), "--level", "weights"],
            }
            common.measure(contestants["floor"])
            runs: dict[str, list[tuple[float, int, float]]] = {}
            for _, name in common.turns(dict.fromkeys(contestants, options.rounds)):
                runs.setdefault(name, []).append(common.spent(contestants[name], env=env))
                common.say(f"{case}, {name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][2]:.2f} CPU-s")
            wall, cpu = (
                {name: statistics.median(run[at] for run in own) for name, own in runs.items()} for at in (0, 2)
            )
            every = "; ".join(" ".join(f"{run[0]:.2f}" for run in runs[name]) for name in contestants)
            peak = max(run[1] for run in runs["check"])
            ratios = [f"{own['check'] / own['floor']:.2f}×" for own in (wall, cpu)]
            seconds = [f"{own[name]:.2f}" for own in (wall, cpu) for name in contestants]
            rows.append([case, *seconds[:2], ratios[0], *seconds[2:], ratios[1], f"{peak / 1e6:.0f} MB", every])
            shutil.rmtree(output)
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"base {size / 1e9:.2f} GB, {READERS} readers; {common.machine('numpy')}\n")
    figures = ["floor, s", "check, s", "ratio", "floor, CPU-s", "check, CPU-s", "ratio of CPU"]
    columns = ["", *figures, "peak", "all runs: floor; check, s"]
    print(common.table(columns, rows))


if __name__ == "__main__":
    main()
