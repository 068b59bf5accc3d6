"""Take a model fine-tuned with FOSSIL (Bone, DiSHA, MiSS), LoRA or its family to where it is used.

>>> import fossil_export
>>> result = fossil_export.merge("my-adapter", "my-model")    # doctest: +SKIP

The commands of `fossil-export` are a thin skin of what is listed in `__all__`, which is what `__init__.pyi` names.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_homes: dict[str, str] = {}


def _find_homes() -> dict[str, str]:
    """The module of each name, from the stub, which type checkers and editors read too; it may lie in a zip file.

    On first use: the command does without, and takes no signals before this package is there.
    """
    if not _homes:
        import ast
        from pkgutil import get_data

        imports = ast.parse(get_data(__name__, "__init__.pyi") or b"").body
        _homes.update(
            (alias.name, found.module)
            for found in imports
            if isinstance(found, ast.ImportFrom) and found.module is not None
            for alias in found.names
        )
    return _homes


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `fossil-export --help` does not wait for NumPy."""
    if name == "__all__":
        return sorted(_find_homes())
    if name not in _find_homes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_find_homes()[name]), name)


def __dir__() -> list[str]:
    return sorted(_find_homes())
