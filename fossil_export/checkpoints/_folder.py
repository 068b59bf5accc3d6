"""A model's files, wherever they lie: in a local folder, or (in `storage/`) elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._stamp import changed
from fossil_export.checkpoints._weights_file import header_of
from fossil_export.errors import CheckpointError, naming, unreadable

if TYPE_CHECKING:
    import numpy as np


class Folder(Protocol):
    """Names are relative to the folder, with forward slashes.

    What a plan needs (names, headers, small files) can be had at once; `fetch` brings whole files here.
    """

    @property
    def path(self) -> Path:
        """Where the files lie, or will lie once they are fetched."""

    @property
    def is_here(self) -> bool:
        """Whether all of its files lie at `path` already, so that there is nothing to fetch."""

    def names(self) -> list[str]:
        """Every file, sorted, but hidden files and those in hidden folders."""

    def root_names(self) -> list[str]:
        """The files that lie in no subfolder, sorted; no hidden ones either."""

    def headers(self, names: Iterable[str]) -> tuple[Header, ...]:
        """The headers of weights files; raises CheckpointError."""

    def read(self, name: str) -> bytes:
        """The whole of a small file."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """`nbytes` bytes of a file from `offset` on, as uint8, in memory: raises CheckpointError where it has fewer."""

    def blob(self, name: str) -> str | None:
        """The Hub's id of a file's content, where it is known: SHA-256 of a large file, git's SHA-1 of a small one."""

    def fetch(self, names: Iterable[str]) -> None:
        """See that these files are at `path`, whole."""

    def check(self, headers: Iterable[Header]) -> None:
        """Hold files that are at `path` now against the headers that were read before they were."""

    def check_links(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for a link out of the folder: what it leads to is not the model's to hand on."""


class LocalFolder:
    """A folder on this machine."""

    is_here = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def within(self, folder: str) -> LocalFolder:
        """The folder of this name in it."""
        return LocalFolder(self.path / folder)

    def names(self) -> list[str]:
        """Raises CheckpointError for what is neither file nor folder, and for links out of the folder. Other links are
        followed, but never in a circle."""
        found = []
        seen = {self.path.resolve()}

        def refuse(problem: OSError) -> None:
            raise CheckpointError(unreadable(problem.filename, problem))

        for root, folders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in [name for name in folders if (Path(root) / name).is_symlink()]:
                _check_link(Path(root) / name, self.path)
                target = (Path(root) / name).resolve()
                if target in seen:
                    folders.remove(name)
                seen.add(target)
            with os.scandir(root) as entries:  # there may be any number of them
                plain = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
            below = Path(root).relative_to(self.path).as_posix()
            for name in sorted(name for name in files if not name.startswith(".")):
                path = Path(root) / name if name not in plain else None
                if path is not None and not path.is_file():
                    raise CheckpointError(f"{path}: is a broken link or no regular file; fetch it again or remove it")
                if path is not None:
                    _check_link(path, self.path)
                found.append(name if below == "." else f"{below}/{name}")
        return sorted(found)

    def root_names(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(one.name for one in entries if not one.name.startswith(".") and _is_file(one))
        except OSError as problem:
            raise CheckpointError(unreadable(self.path, problem)) from problem

    def headers(self, names: Iterable[str]) -> tuple[Header, ...]:
        return tuple(header_of(self.path / name) for name in names)

    def read(self, name: str) -> bytes:
        with naming(self.path / name):
            return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        import numpy as np

        # Not mapped: a file that is cut meanwhile would end the process with a signal.
        found = np.empty(nbytes, np.uint8)
        with naming(self.path / name), (self.path / name).open("rb") as file:
            file.seek(offset)
            count = file.readinto(found.data)  # np.fromfile would take a disk that fails for the end of the file
        if count < nbytes:  # it is shorter than its header said
            raise changed(self.path / name)
        return found

    def blob(self, name: str) -> str | None:
        return hub_blob(self.path / name)

    def fetch(self, names: Iterable[str]) -> None:
        pass

    def check(self, headers: Iterable[Header]) -> None:
        pass

    def check_links(self, names: Iterable[str]) -> None:
        for name in names:
            _check_link(self.path / name, self.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle, or to a place out of reach
        return False


def _check_link(path: Path, folder: Path) -> None:
    """Raise CheckpointError if `path`, or a folder on the way to it, is a link that leads out of `folder`, but for
    files in the Hub's cache."""
    target = path.resolve()
    storage = target.parent.parent
    is_blob = target.parent.name == "blobs" and (storage / "snapshots").is_dir() and target.is_file()
    if not is_blob and not target.is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside its folder, and would be copied from there; put the file itself "
            "in its place, or remove the link"
        )


def hub_blob(path: Path) -> str | None:
    """The id of the blob that a link in the Hub's cache points to; None elsewhere."""
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" else None
