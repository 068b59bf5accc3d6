"""Files that a run reads: a plan names them, and whoever runs it fetches them."""

from __future__ import annotations

from dataclasses import dataclass

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._source import is_read_in_place


@dataclass(frozen=True)
class Needed:
    """The files `names` of `folder`; `headers` are those of them whose headers were read before they were here, which
    with `in_place` are read where they lie, if the folder's place can do that."""

    folder: Folder
    names: tuple[str, ...]
    headers: tuple[Header, ...] = ()
    in_place: bool = False


def fetch(*needed: Needed, whole: bool = False) -> None:
    """See that these files are on this machine, but for those that are read where they lie, unless the `whole` is asked
    for. Raises HubError or StorageError."""
    for one in needed:
        if one.in_place and not whole and is_read_in_place(one.folder):
            far = {header.path.name for header in one.headers}
            one.folder.fetch([name for name in one.names if name not in far])
        else:
            one.folder.fetch(one.names)
            one.folder.check(one.headers)
