"""Where a result is to be, and how it comes together there: file by file, by one process or many, all or nothing.

A `Place` is a folder on this machine or a place in an object store (`find_place`). A process that makes files of a
result opens its `Assembly`, looks at the `notes` on what is finished already, writes what is not, and notes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fossil_export.errors import FossilExportError, OutputError
from fossil_export.storage import expanded
from fossil_export.storage.fsspec._addresses import LOCAL, OTHERS, check_address, scheme_of
from fossil_export.writing._sink import Sink

_CHAIN = re.compile(r"[\w+.-]+::\S*://")  # fsspec's; else it would be the name of a folder here


class Assembly(Sink, Protocol):
    """A result that comes together. What is noted of a finished file outlasts the process, so that an interrupted run
    goes on from there, and so that several processes can make a part each.

    Two processes may write the same file at the same time: each writes under a name of its own, and the last one to
    finish has it (both have the same bytes).
    """

    @property
    def replaced(self) -> tuple[str, ...]:
        """What of `about` (see `Place.assemble`) was another in an unfinished result that was here and is thrown away
        now, in words; empty if there was none."""

    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted of each finished file, by its name; only of those that are still as they were then."""

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        """Say that the file `name`, which this process has written, is finished, with what is to be known of it (JSON).
        Raises OSError."""

    def check_room(self, needed: int) -> None:
        """Raise OutputError unless `needed` more bytes find room."""

    def failed(self, problem: OSError) -> FossilExportError:
        """The error for what the system refused while files were written here: names the place, and the remedy."""

    def publish(self) -> None:
        """All is there: the result takes its place, and the notes go. Raises OutputError."""


class Place(Protocol):
    """A folder on this machine, or a place in an object store."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def output(self) -> Path | str:
        """For results: the folder, or the address."""

    def check(self, inputs: list[Path], overwrite: bool, names: Sequence[str] = ()) -> None:
        """Raise OutputError unless a result may be made here without touching any of `inputs`. `names` are those that
        records have for them, addresses among them."""

    def is_begun(self) -> bool:
        """Whether a result that several processes make can be seen here, begun by one of them. Raises OSError."""

    def assemble(
        self, digest: str, about: Mapping[str, str], *, overwrite: bool = False, shared: bool = False
    ) -> AbstractContextManager[Assembly]:
        """Begin the result, or go on with what an earlier or another process has of it.

        `digest` stands for all that decides its bytes, and `about` for what that is, by name, to tell two apart. If it
        is `shared`, others make parts of it at the same time, and what is there of another digest is refused; else this
        process has it alone, and begins anew if the digest is another. Nobody sees the result before `publish`.

        What is noted stays if the block ends without `publish`, by an interruption (KeyboardInterrupt, SystemExit) or,
        if it is shared, in any way; an Exception in a block that is not shared removes all. Raises OutputError for want
        of permission.
        """


def check_local(given: str | Path) -> None:
    """Raise OutputError for a path that is an address with one slash: it would become a folder of that name here."""
    text = str(given)  # pathlib makes one slash of two
    if (match := re.match(r"([a-z][a-z0-9]+):/(?!/)", text)) is not None:
        address = f"{match[1]}://{text[match.end() :]}"
        raise OutputError(f"{text}: an address has two slashes, '{address}'; for a folder here write './{text}'")


def local_output(given: str | Path) -> Path:
    """The path of a result that can only be made on this machine. Raises OutputError for an address, and for a path
    that cannot be written down."""
    check_local(given)
    scheme = scheme_of(str(given))
    if scheme is not None and scheme not in LOCAL:
        raise OutputError(f"{given}: this is written on this machine only; name a folder here, and copy it there")
    return expanded(given if scheme is None else str(given).partition("://")[2], OutputError).absolute()


def find_place(given: str | Path) -> Place:
    """The place of what the user typed as --output. Raises OutputError, MissingExtraError, and StorageError for what an
    object store refuses."""
    scheme = scheme_of(str(given))
    if scheme is not None or _CHAIN.match(str(given)):
        check_address(str(given), OutputError)
    check_local(given)
    if scheme in OTHERS:
        raise OutputError(f"{given}: is no place for --output; publish with --push-to-hub")
    if scheme is not None and scheme not in LOCAL:
        from fossil_export.writing.remote._place import RemotePlace

        return RemotePlace(str(given))
    from fossil_export.writing._assembly import FolderPlace

    path = given if scheme is None else str(given).partition("://")[2]
    return FolderPlace(expanded(path, OutputError).absolute())
