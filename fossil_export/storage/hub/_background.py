"""Work of the Hub's client that an interrupt need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from fossil_export._threads import in_context

T = TypeVar("T")

_begun: list[Future[Any]] = []


def interruptible(run: Callable[[], T]) -> T:
    """`run()` in a thread of its own. The client waits for all of its downloads before it lets an interrupt through;
    here it comes through at once, and the thread is left to itself."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as problem:  # the caller's to deal with
            future.set_exception(problem)

    _begun.append(future)  # before it starts, since an interrupt may come at any time
    threading.Thread(target=in_context(work), daemon=True).start()
    wait([future])
    _begun.remove(future)
    return future.result()


def is_anything_left() -> bool:
    """Whether something that was interrupted is still at work, for which the end of the process would wait."""
    return not all(future.done() for future in _begun)
