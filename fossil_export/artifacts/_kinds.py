"""The table of kinds. A new kind is one file beside this one and one line here; its card is in cards/kinds/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fossil_export.artifacts import _adapter as adapter
from fossil_export.artifacts import _gguf_lora as gguf_lora
from fossil_export.artifacts import _lora as lora
from fossil_export.artifacts import _merged as merged
from fossil_export.artifacts import _miss as miss
from fossil_export.artifacts import _onnx as onnx
from fossil_export.artifacts._kind import Kind, Look

KINDS = {kind.name: kind for kind in (onnx.KIND, lora.KIND, miss.KIND, adapter.KIND, gguf_lora.KIND, merged.KIND)}
"""By the name that records have. A folder is of the first kind that recognises it."""


def kind_of(look: Look) -> Kind | None:
    """The kind of a folder; None if it is no artifact."""
    return next((kind for kind in KINDS.values() if kind.recognised(look)), None)


def kind_of_file(path: Path) -> Kind | None:
    """The kind that a file is by itself; None for a folder and for other files."""
    found = (kind for kind in KINDS.values() if kind.suffix is not None and path.suffix == kind.suffix)
    return next(found, None) if path.is_file() else None


def kind_named(name: Any) -> Kind | None:
    """The kind that a record names, whatever stands there."""
    return KINDS.get(name) if isinstance(name, str) else None
