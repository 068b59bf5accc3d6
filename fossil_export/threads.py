"""Our threads instead of the linear algebra library's, where we bring our own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def one_blas_thread() -> AbstractContextManager[Any]:
    """For the time of a `with` block BLAS works in the thread that calls it.

    Its own threads on top of ours would take turns on the same cores and wait for each other by spinning.
    """
    import numpy  # noqa: F401  the library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(limits=1, user_api="blas")
    return limits
