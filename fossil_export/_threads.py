"""Our threads: instead of the linear algebra library's, and with a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def one_blas_thread() -> AbstractContextManager[Any]:
    """For the time of a `with` block BLAS works in the thread that calls it.

    Its own threads on top of ours would take turns on the same cores and wait for each other by spinning.
    """
    import numpy  # noqa: F401  the library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(limits=1, user_api="blas")
    return limits


def in_order(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of `calls` in their order; never more than `ahead` of them are queued, at work or not yet taken.

    When it ends, by an error too, none of them is at work any more: close it before what they work on.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(call))
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
