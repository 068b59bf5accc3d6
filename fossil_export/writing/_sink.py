"""Where the files of a result go: a folder here, or another place that files can be written to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._checkpoint import sha256
from fossil_export.writing._output import OutputFile

if TYPE_CHECKING:
    import numpy as np


class Output(Protocol):
    """A large file of known size while it is written."""

    def write(self, offset: int, data: np.ndarray[Any, Any]) -> None:
        """`data` (uint8, contiguous) goes to `offset`. Called by several threads, in any order; every byte of the file
        is written once. `data` may be written over as soon as this returns."""

    def close(self, done: bool) -> None:
        """If it is `done`, the file is whole and durable under its name once this returns; else it is thrown away."""


class SmallFiles(Protocol):
    """A place for small files. Names are relative, with forward slashes."""

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        """Files given as what they hold or as files to copy; in this order, each whole or not there. Raises OSError for
        what the place refuses, or a FossilExportError that says more."""


class Sink(SmallFiles, Protocol):
    """A place for the files of one result. Raises as `SmallFiles` does."""

    def create(self, name: str, size: int, hash: bool = False) -> Output:  # noqa: A002
        """A new file of `size` bytes. Two files may be written at the same time, by several processes. With `hash` its
        `sha256` will be asked for, which some places know best while they write."""

    def sha256(self, name: str) -> str:
        """Hex digest of a file that was created here."""


class FolderSink:
    """A folder on this machine (`Sink`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, name: str, size: int, hash: bool = False) -> OutputFile:  # noqa: A002
        return OutputFile(self.path / name, size)

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        for name, content in contents.items():
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)

    def sha256(self, name: str) -> str:
        return sha256(self.path / name)
