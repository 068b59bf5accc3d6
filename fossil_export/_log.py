"""What is done, told to whoever asks: `fossil-export --verbose`, or logging.getLogger("fossil_export") in Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fossil_export")
"""Its lines are of level INFO. Nothing is formatted while nobody listens."""


def log_surroundings() -> None:
    """What runs here: versions of what is installed, and who computes."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from fossil_export.kernels import library
    from fossil_export.version import __version__

    found = []
    for name in ("numpy", "ml-dtypes", "huggingface-hub", "torch", "transformers", "peft", "onnxruntime"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    log.info("fossil-export %s, Python %s; installed: %s", __version__, platform.python_version(), ", ".join(found))
    how = "compiled loops" if library() is not None else "NumPy"
    log.info("%s, %d cores; computes with %s", platform.machine(), os.cpu_count() or 1, how)


@contextmanager
def timed(message: str, *arguments: object) -> Iterator[None]:
    """Log the line with the seconds that the block took, when it has ended well."""
    started = time.perf_counter()
    yield
    log.info(message + ": %.2f s", *arguments, time.perf_counter() - started)
