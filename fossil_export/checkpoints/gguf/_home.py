"""The folder of a GGUF model: the file where it lies, and beside it the small files that are made of its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._stamp import changed
from fossil_export.writing._scratch import Scratch

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints._folder import Folder


class MadeFolder:
    """The file `own` of `real`, and a temporary folder with small files: `files` at once, and those that `fill` adds
    when others are asked for. It returns what there is to say, which comes after `notes`."""

    def __init__(
        self,
        real: Folder,
        own: str,
        files: Mapping[str, bytes],
        fill: Callable[[Path], Iterable[str]],
        notes: Iterable[str] = (),
    ) -> None:
        self._real, self._own = real, own
        self._fill: Callable[[Path], Iterable[str]] | None = fill
        self.notes = list(notes)
        self._scratch = Scratch()
        self.path = self._scratch.path
        for name, content in files.items():
            (self.path / name).write_bytes(content)

    @property
    def is_here(self) -> bool:
        return self._real.is_here

    def names(self) -> list[str]:
        if self._fill is not None:
            fill, self._fill = self._fill, None
            self.notes += fill(self.path)
        return sorted(path.name for path in self.path.iterdir())

    def root_names(self) -> list[str]:
        return self.names()

    def headers(self, names: Iterable[str]) -> tuple[Header, ...]:
        return self._real.headers(names)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes() if self._is_made(name) else self._real.read(name)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size if self._is_made(name) else self._real.size(name)

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        return self._real.view(name, offset, nbytes)

    def blob(self, name: str) -> str | None:
        return None if self._is_made(name) else self._real.blob(name)

    def fetch(self, names: Iterable[str]) -> None:
        self._real.fetch([name for name in names if not self._is_made(name)])

    def check(self, headers: Iterable[Header]) -> None:
        for header in headers:
            if self.view(header.path.name, 0, len(header.encoded)).tobytes() != header.encoded:
                raise changed(header.path)

    def check_links(self, names: Iterable[str]) -> None:
        self._real.check_links([name for name in names if not self._is_made(name)])

    def _is_made(self, name: str) -> bool:
        if name == self._own:
            return False
        if not (self.path / name).is_file():
            self.names()
        return True
