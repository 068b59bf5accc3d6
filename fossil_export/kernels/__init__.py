"""The compiled loops of kernels.c, if a compiler was there when the package was installed; NumPy does the same without.

FOSSIL_EXPORT_KERNELS=0 in the environment turns them off.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

_NAME = "_library"


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The library, whose functions are called without the interpreter's lock; None if there is none."""
    if os.environ.get("FOSSIL_EXPORT_KERNELS") == "0":
        return None
    for suffix in (*EXTENSION_SUFFIXES, ".so"):
        path = Path(__file__).with_name(f"{_NAME}{suffix}")
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # made for another machine
                return None
    return None
