"""Worker processes that may die: what killed one is a row, and the class goes on in another."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sweep.catalogue import Entry

SILENCE = 120.0  # seconds without a word, after which a worker is taken for stuck
CLASSES = 150  # of one worker; modules of families are never unloaded


@dataclass(frozen=True)
class Task:
    entry: Entry
    kinds: tuple[str, ...]
    done: frozenset[str]


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    kind: str = ""
    heard: float = field(default_factory=time.monotonic)
    tasks: int = 0


def _serve(pipe: Connection) -> None:
    """A worker: a task comes in, kinds (str) and rows go out, and None at its end."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import torch
    import transformers

    from sweep.cases import run_class

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory(prefix="sweep-", dir=memory, ignore_cleanup_errors=True) as folder:
            for word in run_class(task.entry, Path(folder), task.kinds, task.done):
                pipe.send(word)
        pipe.send(None)


def run(tasks: list[Task], jobs: int, report: Callable[[Any], None], died: Callable[[Task, str, str], None]) -> None:
    """`report` gets every row; `died` a task, the kind that was being done and how the worker ended."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def stop(worker: _Worker) -> None:
        worker.pipe.close()  # one that waits for a task ends by itself
        if worker.task is None:
            worker.process.join(10)
        worker.process.kill()
        worker.process.join()
        workers.remove(worker)

    def lost(worker: _Worker, how: str) -> None:
        stop(worker)
        if worker.task is not None:
            died(worker.task, worker.kind, how)
            if worker.kind != "-":
                done = worker.task.done | {worker.kind}
                waiting.append(Task(worker.task.entry, worker.task.kinds, done))

    try:
        while waiting or any(worker.task for worker in workers):
            for worker in [each for each in workers if each.task is None and each.tasks >= CLASSES]:
                stop(worker)
            while len(workers) < jobs and len(workers) < len(waiting) + sum(w.task is not None for w in workers):
                workers.append(start())
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task, worker.kind, worker.heard = waiting.pop(), "-", time.monotonic()
                    worker.tasks += 1
                    worker.pipe.send(worker.task)
            ready = wait([worker.pipe for worker in workers], timeout=5.0)
            for worker in list(workers):
                if worker.pipe in ready:
                    try:
                        word = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        lost(worker, f"the process ended with {worker.process.exitcode}")
                        continue
                    worker.heard = time.monotonic()
                    if word is None:
                        worker.task = None
                    elif isinstance(word, str):
                        worker.kind = word
                    else:
                        if worker.task is not None:
                            worker.task = Task(worker.task.entry, worker.task.kinds, worker.task.done | {word.kind})
                        report(word)
                elif worker.task is not None and time.monotonic() - worker.heard > SILENCE:
                    lost(worker, f"nothing for {SILENCE:.0f} s")
    finally:
        for worker in list(workers):
            stop(worker)
