"""What a streamed merge has uploaded but not committed yet, so that the next run need not do it again."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.merging._survival import Survival
from fossil_export.publishing._operations import uploaded
from fossil_export.writing._single_file import write_file


class Journal:
    """A file that is replaced whole: by name the size, SHA-256 and first bytes of an upload, and the survival of its
    tensors. One that a crash cut off, or anything else that is no journal, holds nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(path.read_bytes())
            self.done = {str(name): _sound(entry) for name, entry in dict(found).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.done = {}

    def add(self, name: str, upload: Any, survival: Mapping[str, Survival]) -> None:
        """Note an upload (UploadInfo) that is complete."""
        self.done[name] = {
            "size": upload.size,
            "sha256": upload.sha256.hex(),
            "sample": base64.b64encode(upload.sample).decode(),
            "survival": {tensor: vars(sums) for tensor, sums in survival.items()},
        }
        write_file(self._path, json.dumps(self.done).encode())

    def operation(self, name: str) -> Any:
        """The addition that puts what was uploaded into a commit."""
        entry = self.done[name]
        return uploaded(name, entry["size"], entry["sha256"], base64.b64decode(entry["sample"]))

    def survival(self, name: str) -> dict[str, Survival]:
        """By tensor of that file."""
        return {tensor: Survival.from_dict(sums) for tensor, sums in self.done[name]["survival"].items()}


def _sound(entry: Any) -> dict[str, Any]:
    """The entry; raises one of the errors above for what `add` never wrote."""
    if type(entry["size"]) is not int or entry["size"] < 0 or len(bytes.fromhex(entry["sha256"])) != 32:
        raise ValueError("no upload")
    base64.b64decode(entry["sample"], validate=True)
    for sums in entry["survival"].values():
        Survival.from_dict(sums)
    return dict(entry)
