"""Take a model fine-tuned with FOSSIL (Bone, DiSHA, MiSS), LoRA or its family to where it is used.

>>> import fossil_export
>>> result = fossil_export.merge("my-adapter", "my-model")    # doctest: +SKIP

The commands of `fossil-export` are a thin skin of what is listed in `__all__`, which is what `__init__.pyi` names.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pkgutil import get_data
from typing import Any


def _homes() -> dict[str, str]:
    """The module of each name, from the stub, which type checkers and editors read too; it may lie in a zip file."""
    imports = ast.parse(get_data(__name__, "__init__.pyi") or b"").body
    return {
        alias.name: found.module
        for found in imports
        if isinstance(found, ast.ImportFrom) and found.module is not None
        for alias in found.names
    }


_HOMES = _homes()

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `fossil-export --help` does not wait for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
