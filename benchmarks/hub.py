"""A merge to the Hub: streamed, against download-merge-upload by fossil-export and by PEFT, over loopback HTTP.

    python benchmarks/hub.py --size 2 --rounds 3 --peft 1
    python benchmarks/hub.py --size 2 --rounds 1 --peft 1 --xet

makes a random Llama-shaped bfloat16 base of about that many GB in four files (benchmarks/merge.py), of which the
first holds the embedding alone, and a q,v-only adapter (tile, r = 64); both lie on a Hub on this machine
(tests/loopback). Every contestant is a whole process with an empty cache. Prints, as Markdown, medians of the
bytes that moved and of the wall time, the process's peak memory, and the most bytes on the client's disk, looked at
every few milliseconds. With --xet large files move by hf_xet, from and to a folder, whose bytes are not counted here.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import common
import merge
from loopback import LoopbackHub, environment  # type: ignore[import-not-found]

TOKEN = "hf_benchmark"


@dataclass(frozen=True)
class Run:
    """Seconds; bytes from the Hub, to the Hub, on the client's disk and in its memory at most, and of untouched files
    either way."""

    seconds: float
    memory: int
    down: int
    up: int
    disk: int
    untouched: int


def contestants(base: str, adapter: str, target: str, home: Path) -> dict[str, list[str]]:
    tool = [sys.executable, "-m", "fossil_export", "merge", adapter, "--push-to-hub", target]
    return {
        "fossil-export, streamed": [*tool, "--stream", "--cache-dir", str(home / "stream")],
        "fossil-export, to a folder and pushed": [*tool, "--output", str(home / "merged")],
        "PEFT, `push_to_hub`": [
            sys.executable,
            "-c",
            merge.PEFT_MERGE.format(save="push_to_hub"),
            base,
            adapter,
            target,
        ],
    }


def run(hub: Any, command: list[str], target: str, home: Path) -> Run:
    """One contestant with an empty home, which is removed afterwards."""
    home.mkdir()
    (home / "tmp").mkdir()
    hub.reset_log()
    kept = [] if hub.xet is None else list(hub.xet.of_client())
    before = sum(size_of(folder) for folder in kept)
    with largest([home, *kept]) as sizes:
        env = {**environment(hub, home, TOKEN), "TMPDIR": str(home / "tmp")}
        seconds, memory = common.measure(command, env=env)
    down, up = hub.moved()
    shutil.rmtree(home)
    same = {digest for name, (_, digest) in hub.files("ada/base").items() if name.endswith(".safetensors")}
    same &= {digest for _, digest in hub.files(target).values()}
    untouched = sum(r.sent + r.received for r in hub.log if any(digest in r.path for digest in same))
    return Run(seconds, memory, down, up, max(sizes) - before, untouched)


@contextmanager
def largest(folders: list[Path]) -> Iterator[list[int]]:
    """The sizes of everything in `folders`, again and again until the block ends."""
    sizes = [0]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            sizes.append(sum(map(size_of, folders)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def size_of(folder: Path) -> int:
    return sum(taken(Path(root) / name) for root, _, names in os.walk(folder) for name in names)


def taken(path: Path) -> int:
    """Bytes that a file takes on the disk; links take none."""
    try:
        return 0 if path.is_symlink() or not path.is_file() else path.stat().st_blocks * 512
    except OSError:
        return 0  # gone meanwhile


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=2, help="of the base, in GB (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of fossil-export (default 3)")
    parser.add_argument("--peft", type=int, default=1, help="runs of PEFT (default 1)")
    parser.add_argument("--xet", action="store_true", help="move large files by the Xet protocol")
    parser.add_argument("--work", type=Path, default=common.WORK)
    options = parser.parse_args()
    base = options.work / f"base-{options.size:g}"
    layers = merge.make_base(base, options.size)
    adapter = options.work / "hub-qv"
    merge.make_adapter(adapter, Path("ada/base"), layers, ["q_proj", "v_proj"])
    files = {path.name: path.stat().st_size for path in sorted(base.glob("*.safetensors"))}

    results: dict[str, list[Run]] = {}
    with (
        tempfile.TemporaryDirectory(dir=options.work) as temporary,
        LoopbackHub(Path(temporary) / "hub", {TOKEN: "ada"}, xet=options.xet) as hub,
    ):
        hub.add_folder("ada/base", base)
        hub.add_folder("ada/adapter", adapter)
        home = Path(temporary) / "home"
        commands = contestants("ada/base", "ada/adapter", "TARGET", home)
        runs = {name: options.peft if name.startswith("PEFT") else options.rounds for name in commands}
        for number, name in common.turns(runs):
            target = f"ada/merged-{number}-{list(commands).index(name)}"
            command = [target if word == "TARGET" else word for word in commands[name]]
            results.setdefault(name, []).append(run(hub, command, target, home))
            common.say(f"{name}: {results[name][-1]}")

    total, most = sum(files.values()), max(files.values())
    sizes = ", ".join(f"{size / 1e6:.0f}" for size in files.values())
    print(f"{total / 1e9:.2f} GB in files of {sizes} MB; {common.machine('huggingface_hub')}\n")
    rows = []
    for name, found in results.items():
        down, up = (statistics.median(getattr(one, what) for one in found) / 1e6 for what in ("down", "up"))
        moved = ["–", "–"] if options.xet else [f"{down:.0f} MB", f"{up:.0f} MB"]
        disk, memory = max(one.disk for one in found), max(one.memory for one in found) / 1e6
        seconds = statistics.median(one.seconds for one in found)
        rows.append([name, *moved, f"{disk / 1e6:.0f} MB", f"{disk / most:.2f}×", f"{memory:.0f} MB", f"{seconds:.1f}"])
    columns = ["", "from the Hub", "to the Hub", "peak disk", "against the largest file", "peak memory", "seconds"]
    print(common.table(columns, rows))
    if not options.xet:
        untouched = max((one.untouched for one in results.get("fossil-export, streamed", [])), default=0)
        print(f"\nOf the untouched files, streamed: {untouched:,} bytes moved, headers included.")


if __name__ == "__main__":
    main()
