"""Does memory stay flat? Merges of sparse models of any size into nowhere, each in a process of its own.

    python benchmarks/flat.py                  # all cases, a table in Markdown
    python benchmarks/flat.py --only 'bat|70B' --cores 2

Bases and adapters are sparse files with real headers (`sparse.py`), so that 2 TB take a few MB of disk; what is merged
is thrown away (a sink that reads every page of it). Numbers of cores are told to the process by `os.cpu_count`. A row
has the peak of the plan and of the merge after it (VmHWM, which counts pages of mapped files too) and their seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import sparse

CHILD = """
import json, sys
from flat import child
child(json.loads(sys.argv[1]))
"""


def peak(reset: bool = False) -> int:
    """The largest resident size of this process since it was last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def child(case: dict[str, Any]) -> None:
    os.cpu_count = lambda: case["cores"]
    from fossil_export.merging._planning import plan_merge
    from fossil_export.merging._run import Writer

    started = time.perf_counter()
    adapters = case["adapters"]
    plan = plan_merge(adapters if len(adapters) > 1 else adapters[0], case["base"], **case.get("options", {}))
    planned, plan_peak = time.perf_counter() - started, peak()
    peak(reset=True)
    started, cpu, nbytes = time.perf_counter(), sum(os.times()[:2]), 0
    limit = case.get("limit", 1 << 62)
    with Writer(plan) as writer:
        for file in plan.files:
            writer.write(file, sparse.Nowhere())
            nbytes += file.size
            if nbytes > limit:
                break
    print(json.dumps({
        "tensors": plan.parameters, "plan": plan_peak, "planned": planned, "peak": peak(), "bytes": nbytes,
        "seconds": time.perf_counter() - started, "cpu": sum(os.times()[:2]) - cpu,
    }))  # fmt: skip


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What `child` prints. Raises SystemExit with its errors."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(case)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{case}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def layer(size: str, layers: int = 1, tokens: int = 256) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A Llama of the widths of one, with few layers and tokens."""
    width, inner, _, heads, keys, _ = sparse.LLAMA[size]
    return sparse.llama(width, inner, layers, heads, keys, tokens)


def cases(work: Path, cores: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Name → what `child` takes; its files are made."""
    found: dict[str, dict[str, Any]] = {}

    def add(
        name: str,
        model: tuple[dict[str, Any], dict[str, tuple[int, ...]]],
        dtype: str,
        kinds: list[tuple[str, int]],
        **more: Any,
    ) -> None:
        base = work / re.sub(r"\W+", "-", name)
        for count in cores:
            found[f"{name}, {count} cores"] = {"make": (base, model, dtype, kinds), "cores": count, **more}

    for size in ("8B", "70B", "405B"):
        for kind, rank in (
            ("tile", 8),
            ("tile", 512),
            ("mini", 512),
            ("lora", 8),
            ("lora", 512),
            ("dora", 64),
            ("bat", 64),
            ("bat", 512),
        ):
            if kind != "bat" or rank == 64 or size != "8B":
                add(f"{size} wide, bf16, {kind} r={rank}", layer(size), "BF16", [(kind, rank)])
    for dtype in ("F16", "F32", "F64"):
        for kind, rank in (("tile", 64), ("lora", 512), ("dora", 64), ("bat", 512)):
            add(f"70B wide, {dtype}, {kind} r={rank}", layer("70B"), dtype, [(kind, rank)])
    for target in ("float32", "float16"):
        add(f"70B wide, bf16 as {target}, lora r=64", layer("70B"), "BF16", [("lora", 64)], options={"dtype": target})
    add("70B wide, bf16, 3 × lora r=512", layer("70B"), "BF16", [("lora", 512)] * 3)
    add("405B wide, bf16, 3 × lora r=512", layer("405B"), "BF16", [("lora", 512)] * 3)
    add("8B wide, bf16, 100 × lora r=16", layer("8B"), "BF16", [("lora", 16)] * 100)
    add("embedding 256k × 16k", sparse.llama(16384, 16384, 1, 128, 8, 256 << 10), "BF16", [("lora", 64)])
    add(
        "embedding 256k × 16k as float32",
        sparse.llama(16384, 16384, 1, 128, 8, 256 << 10),
        "BF16",
        [("lora", 64)],
        options={"dtype": "float32"},
    )
    tiny = sparse.llama(8, 8, 11000, 1, 1, 8)
    add("99,000 tiny tensors, tile r=4", tiny, "BF16", [("tile", 4)])
    add("405B, bf16, lora r=16", sparse.llama(*sparse.LLAMA["405B"]), "BF16", [("lora", 16)], limit=1 << 30)
    add("405B, bf16, tile r=512", sparse.llama(*sparse.LLAMA["405B"]), "BF16", [("tile", 512)], limit=1 << 30)
    width, inner, _, heads, keys, tokens = sparse.LLAMA["405B"]
    add(
        "2 TB, bf16, lora r=16",
        sparse.llama(width, inner, 310, heads, keys, tokens),
        "BF16",
        [("lora", 16)],
        limit=1 << 30,
    )
    return found


def make(
    base: Path, model: tuple[dict[str, Any], dict[str, tuple[int, ...]]], dtype: str, kinds: list[tuple[str, int]]
) -> list[str]:
    config, shapes = model
    if not base.exists():
        sparse.model(base, config, shapes, dtype)
        if any(kind == "dora" for kind, _ in kinds):
            sparse.begin_rows(base)
    adapters = []
    for number, (kind, rank) in enumerate(kinds):
        folder = base.with_name(f"{base.name}-{kind}-{rank}-{number}")
        if not folder.exists():
            sparse.adapter(folder, *sparse.trained(kind, rank, shapes, base), dtype="F32" if dtype == "F64" else dtype)
        adapters.append(str(folder))
    return adapters


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--only", default="", help="regular expression of the cases to run")
    options.add_argument("--cores", type=int, nargs="+", default=[2, 16])
    options.add_argument("--json", type=Path, help="write all figures there")
    given = options.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    print(common.header(["", "tensors", "GB", "plan MB", "plan s", "merge MB", "s", "CPU-s"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="flat-") as work:
        for name, case in cases(Path(work), tuple(given.cores)).items():
            if not re.search(given.only, name):
                continue
            made = case.pop("make")
            adapters = make(*made)
            row = rows[name] = run({**case, "base": str(made[0]), "adapters": adapters})
            cells = [
                name,
                f"{row['tensors']:,}",
                f"{row['bytes'] / 1e9:.1f}",
                f"{row['plan'] / 1e6:.0f}",
                f"{row['planned']:.1f}",
            ]
            print(
                common.row([*cells, f"{row['peak'] / 1e6:.0f}", f"{row['seconds']:.1f}", f"{row['cpu']:.1f}"]),
                flush=True,
            )
    if given.json:
        common.write_json(given.json, rows)


if __name__ == "__main__":
    main()
