"""Where a weights file is read from while a model is merged or compared: this machine, or the place where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._input import InputFile
from fossil_export.errors import FossilExportError

if TYPE_CHECKING:
    import numpy as np


class Source(Protocol):
    """A weights file that is read piece by piece, by several threads. All raise a FossilExportError for a file that is
    not the one whose header was read."""

    def read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8, contiguous) with the bytes from `offset` on."""

    def read_rows(self, offset: int, stride: int, out: np.ndarray[Any, Any]) -> None:
        """Fill each row of `out` (rows, n) (uint8, contiguous) with the n bytes that are `stride` bytes further on than
        those of the row before; the first ones are at `offset`."""

    def check(self) -> None:
        """Raise where the file was written to or replaced since it was opened."""

    def close(self) -> None:
        """No more is read."""


@runtime_checkable
class Viewed(Protocol):
    """A source whose bytes need not be copied to be handed to the system."""

    def view(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """`nbytes` bytes from `offset` on, as uint8; only for handing to the system."""

    def release(self, offset: int, nbytes: int) -> None:
        """A range that was viewed is not needed any more."""


@runtime_checkable
class ReadInPlace(Protocol):
    """A folder elsewhere whose weights can be read by ranges where they lie, so that none need be brought here."""

    address: str
    """What the user knows it by."""

    @property
    def path(self) -> Path:
        """Where its files would lie."""

    def open(self, header: Header) -> Source:
        """The file that the header was read of; it is still the one that was listed."""

    def etag(self, name: str) -> str | None:
        """What the place calls the state of a file, if it does."""


def is_read_in_place(folder: Folder) -> bool:
    """Whether weights of this folder are read where they lie."""
    return isinstance(folder, ReadInPlace)


def open_source(folder: Folder | None, header: Header, moved: Path | None = None) -> Source:
    """The file that `header` was read of: where it `moved` to; at its path, if it is there; else in `folder`."""
    if moved is not None and moved != header.path:
        return InputFile(moved, header, steady=False)
    if isinstance(folder, ReadInPlace) and not header.path.is_file():
        return folder.open(header)
    return InputFile(header.path, header)


@contextmanager
def by_address(*folders: Folder) -> Iterator[None]:
    """Errors in the block name the places of files that are read there, not those where nothing lies."""
    try:
        yield
    except FossilExportError as problem:
        problem.args = (shown(str(problem), *folders),)
        raise


def shown(text: str, *folders: Folder) -> str:
    """`text` with the addresses of these folders in the place of their paths."""
    for folder in folders:
        if isinstance(folder, ReadInPlace):
            text = text.replace(str(folder.path), folder.address)
    return text


def by_path(*folders: tuple[Folder, Iterable[Header]]) -> dict[Path, tuple[Folder, Header]]:
    """The headers by path, each with the folder that it is of."""
    return {header.path: (folder, header) for folder, headers in folders for header in headers}
