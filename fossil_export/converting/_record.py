"""From what a converted adapter was made: `fossil_export.json`, or the same within a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import sha256
from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.converting._options import Options
from fossil_export.version import __version__


def write_record(folder: Path, adapter: Adapter, options: Options, artifact: str, details: Mapping[str, Any]) -> None:
    """Write the record into `folder`; `artifact` is the kind of it."""
    (folder / PROVENANCE).write_bytes(write_json(record_of(adapter, options, artifact, details)))


def record_of(adapter: Adapter, options: Options, artifact: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an `artifact` of this kind."""
    files = [{"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)} for path in adapter.files]
    return {
        "format": 1,
        "tool": {"name": "fossil-export", "version": __version__},
        "artifact": artifact,
        "dtype": "auto",
        "adapter": {
            "name": adapter.name,
            "revision": adapter.revision,
            "peft_type": adapter.peft_type,
            "variant": adapter.variant,
            "rank": adapter.rank,
            "parameters": adapter.parameters,
            "files": files,
        },
        "base": {"name": options.base_name or "", "revision": options.base_revision, "weights": []},
        artifact: dict(details),
    }
