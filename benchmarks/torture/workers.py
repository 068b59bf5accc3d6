"""Processes that make attempts; one that dies takes only its own share with it."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterable
from typing import Any

from torture.rows import Row


def in_workers(serve: Callable[..., None], shares: Iterable[tuple[Any, ...]], report: Callable[[Row], None]) -> None:
    """Run `serve(*share, rows)` for each share in a new process; it puts what is reported into the queue `rows`."""
    context = multiprocessing.get_context("spawn")
    rows = context.Queue()
    workers = [context.Process(target=serve, args=(*share, rows)) for share in shares]
    for worker in workers:
        worker.start()
    while True:
        is_over = not any(worker.is_alive() for worker in workers)  # asked before the queue is
        try:
            report(rows.get(timeout=1.0))
        except queue.Empty:
            if is_over:
                break
    for worker in workers:
        worker.join()
