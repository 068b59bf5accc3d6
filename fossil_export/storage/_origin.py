"""Where files come from, and what every storage answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._folder import Folder
from fossil_export.errors import FossilExportError


@runtime_checkable
class Nested(Protocol):
    """A folder that can give those that are in it."""

    def within(self, folder: str) -> Folder:
        """The folder of this name in it."""


@dataclass(frozen=True)
class Origin:
    """What the user named.

    `name` is for records: the id of a model on the Hub, for a path what was typed, with ./ before what reads as an id.
    `folder` holds the files; `file` is the one in it that was meant, None for all. `revision` is its commit, if it is
    known, and `branch` what was typed of it. With `is_path` the name is a path on this machine, and the files are the
    user's; else the revision stands for the content, and the files are copies in a cache.
    """

    name: str
    folder: Folder
    file: str | None = None
    revision: str | None = None
    branch: str | None = None
    notes: tuple[str, ...] = ()
    is_path: bool = False

    @property
    def path(self) -> Path:
        """Where it lies, or will lie once it is fetched."""
        return self.folder.path / (self.file or "")

    @property
    def typed(self) -> str:
        """How the user may name it, so that a folder in it is that with / and its name."""
        if self.is_path:
            return str(self.folder.path)
        revision = f"@{self.branch}" if self.branch else ""
        return self.name if "://" in self.name else f"hf://{self.name}{revision}"

    def checkpoint(self) -> Checkpoint:
        """The model that lies there, opened by its headers."""
        # The formats that a base may have are many, and no command's help needs them.
        from fossil_export.checkpoints._opening import open_checkpoint

        with self.by_name():
            return open_checkpoint(self.path if self.is_path else self.folder, self.file)

    def within(self, inside: str, note: str) -> Origin:
        """The folder `inside` of this one, and a note on why it is that; itself if its storage has no such folders."""
        if not isinstance(self.folder, Nested):
            return self
        start = self.name if self.is_path or "://" in self.name else f"hf://{self.name}"
        name = f"{start.rstrip('/')}/{inside}"
        return replace(self, name=name, folder=self.folder.within(inside), notes=(*self.notes, note))

    def shown(self, text: str) -> str:
        """`text` with the name in the place of the cache's folder, which the user does not know."""
        if self.is_path:
            return text
        name = self.name.removesuffix(f"/{self.file}") if self.file else self.name
        return text.replace(str(self.folder.path), name)

    @contextmanager
    def by_name(self) -> Iterator[None]:
        """Errors in the block are told as `shown` has them."""
        try:
            yield
        except FossilExportError as problem:
            problem.args = (self.shown(str(problem)),)
            raise


@dataclass(frozen=True)
class ModelName:
    """A record's name of a model that is no path: `id` is what PEFT loads it by, `folder` where it lies within that
    (None for the root), `page` its page for people, if it has one."""

    id: str
    folder: str | None = None
    page: str | None = None


class Storage(Protocol):
    """A place where models and adapters are kept."""

    addresses: tuple[str, ...] = ()
    """How the addresses begin that are in this storage, whatever paths there are here ("hf://")."""

    def find(self, given: str | Path, error: type[FossilExportError], what: str) -> Origin | None:
        """What `given` names here, None if it names nothing here; raises `error` for what may not be read."""

    def parse(self, name: str) -> ModelName | None:
        """A record's `name` taken apart, None if it is of no model in this storage."""
        return None

    def pinned(self, name: str, revision: str) -> str:
        """A record's `name`, which is in this storage, with its revision."""
        return name
