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

_POINTER, _SIZE, _STEP, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ssize_t, ctypes.c_int
_UPDATE = [_POINTER, _SIZE, _STEP, _STEP]
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "fossil_word_sums": (None, [_POINTER, _SIZE, _POINTER]),
    "fossil_level": (_INT, [_INT]),
    "fossil_merge": (_INT, [_POINTER, _STEP, _INT, _POINTER, _INT, _SIZE, _SIZE, *_UPDATE]),
    "fossil_measure": (None, [_POINTER, _POINTER, _POINTER, _INT, _SIZE, _POINTER]),
}
# What each function returns and takes.


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The library, whose functions are called without the interpreter's lock; None if there is none."""
    if os.environ.get("FOSSIL_EXPORT_KERNELS") == "0":
        return None
    for suffix in (*EXTENSION_SUFFIXES, ".so"):
        path = Path(__file__).with_name(f"{_NAME}{suffix}")
        if path.is_file():
            try:
                found = ctypes.CDLL(str(path))
                for name, (result, arguments) in _SIGNATURES.items():
                    function = getattr(found, name)
                    function.restype, function.argtypes = result, arguments
            except (OSError, AttributeError):  # made for another machine, or by another version
                return None
            return found
    return None
