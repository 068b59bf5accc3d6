"""Threads: how many, how those of libraries wait, and ours instead of BLAS's, with a bounded queue."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from fossil_export._cores import cores

T = TypeVar("T")

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
"""How threads of OpenMP wait for each other: asleep; GCC's (PyTorch's on Linux) spin for some microseconds before.

As they are, they spin for milliseconds at the end of each operation. If others work on the same cores, that is the time
in which the thread that they wait for could have run. Figures: benchmarks/loaded.py.
"""


def threads() -> int:
    """Threads for what computes: OMP_NUM_THREADS if the user set it, else the cores that may be used."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else cores()


def wait_asleep() -> None:
    """Have OpenMP's threads in this process, and in those that it starts, wait as `WAITING` says.

    For a process of our own. What the user has set about it stays.
    """
    if not _is_waiting_set():
        os.environ.update(WAITING)


def import_torch() -> Any:
    """PyTorch. If this is its first import, its threads wait as `WAITING` says; the environment is left as it was."""
    if "torch" not in sys.modules and not _is_waiting_set():
        os.environ.update(WAITING)
        try:
            import torch

            torch.get_num_threads()  # some builds of OpenMP read the environment only when they are first used
        finally:
            for name in WAITING:
                os.environ.pop(name, None)
    import torch

    return torch


def _is_waiting_set() -> bool:
    return any(name in os.environ for name in (*WAITING, "KMP_BLOCKTIME"))


@contextmanager
def bounded_torch(most: int | None = None) -> Iterator[None]:
    """PyTorch takes no more threads than `threads()` and `most`; fewer, if it was told so."""
    torch = import_torch()
    before = torch.get_num_threads()
    allowed = min(threads(), most or threads())
    if before > allowed:  # otherwise nothing is set: on some builds that alone changes how work is divided
        torch.set_num_threads(allowed)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def one_blas_thread() -> AbstractContextManager[Any]:
    """For the time of a `with` block BLAS works in the thread that calls it.

    Its own threads on top of ours would take turns on the same cores and wait for each other by spinning.
    """
    import numpy  # noqa: F401  the library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(limits=1, user_api="blas")
    return limits


def in_context(run: Callable[..., T]) -> Callable[..., T]:
    """`run` for another thread: it tells its notes to whoever is told here, and to nobody else."""
    here = copy_context()
    return lambda *arguments: here.copy().run(run, *arguments)  # a copy, since each is entered by one thread at a time


def in_order(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of `calls` in their order; never more than `ahead` of them are queued, at work or not yet taken.

    When it ends, by an error too, none of them is at work any more: close it before what they work on.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(in_context(call)))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


@contextmanager
def one_torch_thread(torch: Any) -> Iterator[None]:
    """PyTorch computes in this thread alone, so that its sums are the same on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
