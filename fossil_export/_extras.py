"""Optional packages, imported when they are needed, with one message that says which extra brings them."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from fossil_export.errors import FossilExportError, MissingExtraError


def required(package: str, extra: str = "onnx", purpose: str = "working on ONNX graphs") -> Any:
    """Import `package` (a module's name), or raise MissingExtraError that says which extra brings it."""
    try:
        return import_module(package)
    except ImportError as problem:
        raise MissingExtraError(problem.name or package, extra, purpose) from problem


def needs_transformers_5(purpose: str) -> None:
    """Raise FossilExportError if an older transformers is installed, whose parts are others."""
    found = version("transformers")
    if int(found.partition(".")[0]) < 5:
        raise FossilExportError(f"{purpose} needs transformers 5 or later, not {found}: pip install 'transformers>=5'")
