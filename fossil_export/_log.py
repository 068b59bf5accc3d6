"""What is done, told to whoever asks: `fossil-export --verbose`, or logging.getLogger("fossil_export") in Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fossil_export")
"""Its lines are of level INFO. Nothing is formatted while nobody listens."""


@contextmanager
def timed(message: str, *arguments: object) -> Iterator[None]:
    """Log the line with the seconds that the block took, when it has ended well."""
    started = time.perf_counter()
    yield
    log.info(message + ": %.2f s", *arguments, time.perf_counter() - started)
