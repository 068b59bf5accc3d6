"""The record of how a GGUF adapter was made, which it carries in its own metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fossil_export._extras import required
from fossil_export.errors import CheckpointError

RECORD = "fossil_export.record"
"""Metadata key; the value is JSON, as `fossil_export.json` has it."""


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a GGUF file, None where it has none. Raises CheckpointError for what is no GGUF file, and
    MissingExtraError without the package that reads them."""
    gguf = required("gguf", "gguf", "reading GGUF files")
    try:
        field = gguf.GGUFReader(path).get_field(RECORD)
        found = None if field is None else json.loads(field.contents())
    except Exception as problem:  # whatever the reader makes of a damaged file
        raise CheckpointError(f"{path}: is no GGUF file that can be read ({problem}); convert it again") from problem
    return found if isinstance(found, dict) else None
