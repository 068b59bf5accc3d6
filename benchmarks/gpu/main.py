"""The run: look at what is at hand, then case by case, each row into the journal as it comes."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import transformers
from common import parser, publish, say, write_json

from gpu import preflight, report
from gpu.cases import DTYPES, PARTS, Case, Row, Setup, blank, cases, full_setup, small_setup, verdict
from gpu.journal import Entry, Journal, JournalError
from gpu.layers import Layers
from gpu.models import Models
from gpu.tools import Scratch, arithmetic, free, line_of

COMPLETE, FOUND, REFUSED, CUT = 0, 1, 2, 3
"""Exit codes."""


class Bench(Protocol):
    """Makes the rows of one part, and keeps what neighbouring cases share until it is closed."""

    def row(self, case: Case) -> Row: ...

    def close(self) -> None: ...


def main(description: str, started: float, argv: Sequence[str] | None = None) -> int:
    """`started` is the monotonic time from which --seconds counts."""
    options = _arguments(description, argv)
    device: str = options.device
    problem = preflight.no_device(device)
    if problem is not None:
        say(problem)
        return FOUND
    make = small_setup if options.small else full_setup
    setup = make(device, options.steps, options.lr)
    machine = preflight.machine(device)
    say(", ".join(f"{name} {value}" for name, value in machine.items()))
    onnx = preflight.onnx_part(device, options.dtypes) if "onnx" in options.parts else preflight.OnnxPart({}, (), ())
    for line in onnx.left_out:
        say(f"left out: {line}")
    wanted = [case for case in cases(setup, options.parts, options.dtypes) if _runs(case, onnx)]
    if not wanted:
        say("nothing is left to run")
        return FOUND
    try:
        header = {"machine": machine, "setup": asdict(setup)}
        journal = Journal(options.journal, header, onnx.versions if onnx.dtypes else None, options.fresh)
    except (JournalError, OSError) as refusal:
        say(str(refusal))
        return REFUSED
    transformers.utils.logging.disable_progress_bar()  # a line for every row is enough
    try:
        with arithmetic(1 if options.small else None), warnings.catch_warnings():  # at small sizes threads wait
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
            done = _run(setup, wanted, journal, options, onnx.versions, started)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on, by {options.journal}")
        return 130
    finally:
        journal.close()
    return _finish(setup, machine, journal, onnx.left_out, options, done)


def _runs(case: Case, onnx: preflight.OnnxPart) -> bool:
    return case.part != "onnx" or case.dtype in onnx.dtypes


def _run(
    setup: Setup,
    wanted: Sequence[Case],
    journal: Journal,
    options: argparse.Namespace,
    versions: dict[str, str],
    started: float,
) -> bool:
    """Run what the journal lacks, rows that failed before last; False where time ran out first."""
    failed = [case for case in wanted if case in journal.entries and journal.entries[case].row.failed]
    todo = [case for case in wanted if case not in journal.entries] + failed
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} rows are in {options.journal} already")
    # The same folder for the same journal: a run that was killed leaves files, which the next one removes.
    name = hashlib.sha256(str(options.journal.absolute()).encode()).hexdigest()[:12]
    folder = (options.work or Path(tempfile.gettempdir())) / f"gpu-parity-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bench: Bench | None = None
    part = ""
    # So that files are removed when `timeout` or the like ends the run.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        scratch = Scratch(folder)
        for count, case in enumerate(todo):
            longest = max((e.seconds for e in journal.entries.values() if e.case.part == case.part), default=0.0)
            left = options.seconds - (time.monotonic() - started)
            if count and left < longest:
                say(
                    f"stopped before {options.seconds:g} s; {len(todo) - count} rows are left: the same command goes on"
                )
                return False
            if bench is None or part != case.part:
                if bench is not None:
                    bench.close()
                bench, part = _bench(case.part, setup, scratch), case.part
            journal.add(entry := replace(_entry(setup, bench, scratch, case), versions=_versions(case, versions)))
            found = verdict([entry.row])
            told = "; ".join(found) or f"{entry.row.where}: {entry.row.ending or 'within its bounds'}"
            say(f"[{len(wanted) - len(todo) + count + 1}/{len(wanted)}] {case.part}: {told} ({entry.seconds:.1f} s)")
        return True
    finally:
        signal.signal(signal.SIGTERM, before)
        if bench is not None:
            bench.close()
        shutil.rmtree(folder, ignore_errors=True)


def _versions(case: Case, versions: dict[str, str]) -> dict[str, str]:
    return versions if case.part == "onnx" else {}


def _bench(part: str, setup: Setup, scratch: Scratch) -> Bench:
    if part == "layers":
        return Layers(setup, scratch)
    if part == "models":
        return Models(setup, scratch)
    from gpu.graphs import Graphs  # what it needs may be missing

    return Graphs(setup, scratch)


def _entry(setup: Setup, bench: Bench, scratch: Scratch, case: Case) -> Entry:
    """Run one case; an error is its row, and the run goes on."""
    started, written, scratch.peak = time.perf_counter(), scratch.written, 0
    try:
        row = bench.row(case)
    except Exception as problem:
        scratch.note()
        bench.close()  # nothing half made is used again
        row = replace(blank(setup, case), failed=line_of(problem))
    free()
    return Entry(case, row, time.perf_counter() - started, scratch.written - written, scratch.peak)


def _finish(
    setup: Setup,
    machine: dict[str, str],
    journal: Journal,
    left_out: Sequence[str],
    options: argparse.Namespace,
    done: bool,
) -> int:
    record = report.figures(setup, machine, journal.entries, left_out)
    text = report.document(setup, machine, journal.entries, left_out)
    print(text)
    if options.output is not None:
        publish(options.output, text)
    if options.json is not None:
        write_json(options.json, record)
    for line in record["problems"]:
        say(line)
    return FOUND if record["problems"] else COMPLETE if done else CUT


def _arguments(description: str, argv: Sequence[str] | None) -> Any:
    arguments = parser(description)
    arguments.add_argument("--device", default="cuda", help="cuda, cuda:1, …, or cpu to try the script (default cuda)")
    arguments.add_argument("--small", action="store_true", help="tiny dimensions")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all three, in this order")
    arguments.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: all three")
    arguments.add_argument("--steps", type=int, default=10, help="of AdamW (default 10)")
    arguments.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    arguments.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop before a row that would likely end later than this"
    )
    arguments.add_argument("--work", type=Path, help="existing folder for temporary models (default: the system's)")
    arguments.add_argument(
        "--journal", type=Path, metavar="FILE", help="rows as they come (default: beside --output, or gpu_parity.jsonl)"
    )
    arguments.add_argument("--fresh", action="store_true", help="begin the journal anew")
    arguments.add_argument("--output", type=Path, metavar="FILE.md", help="write the document here, too")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = arguments.parse_args(argv)
    if options.journal is None:
        options.journal = Path("gpu_parity.jsonl") if options.output is None else options.output.with_suffix(".jsonl")
    for path in (options.journal, options.output, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            arguments.error(f"{path}: its folder does not exist; make it first")
    if options.work is not None and not options.work.is_dir():
        arguments.error(f"--work {options.work}: is no folder; make it first")
    names = [path.absolute() for path in (options.journal, options.output, options.json) if path is not None]
    if len(set(names)) < len(names):
        arguments.error("--journal, --output and --json must be different files")
    return options
