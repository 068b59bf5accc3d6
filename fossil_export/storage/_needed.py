"""Files that a run reads: a plan names them, and whoever runs it fetches them."""

from __future__ import annotations

from dataclasses import dataclass

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import Header


@dataclass(frozen=True)
class Needed:
    """The files `names` of `folder`; `headers` are those of them whose headers were read before they were here."""

    folder: Folder
    names: tuple[str, ...]
    headers: tuple[Header, ...] = ()


def fetch(*needed: Needed) -> None:
    """See that these files are on this machine, whole. Raises HubError."""
    for one in needed:
        one.folder.fetch(one.names)
        one.folder.check(one.headers)
