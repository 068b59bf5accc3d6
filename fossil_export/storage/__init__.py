"""Where models and adapters come from: what the user typed becomes an `Origin`, on this machine or elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from fossil_export._log import log
from fossil_export.errors import FossilExportError
from fossil_export.storage._local import LocalStorage
from fossil_export.storage._needed import Needed, fetch
from fossil_export.storage._origin import ModelName, Origin, Storage
from fossil_export.storage._paths import expanded, is_path, nothing_there, resolve
from fossil_export.storage.fsspec._find import FsspecStorage
from fossil_export.storage.hub._find import HubStorage

STORAGES: dict[str, Storage] = {"local": LocalStorage(), "hub": HubStorage(), "fsspec": FsspecStorage()}
"""In the order in which they are asked. A new storage is one file and one entry here."""


def find_origin(given: str | Path, error: type[FossilExportError], what: str) -> Origin:
    """What `given` names: an address in the storage it belongs to, else the first that has something of this name, so
    that a path that exists wins over a model of that name on the Hub.

    `what` is the word for it in messages ("adapter", "base model"). Raises `error` if there is nothing or it may not
    be read, HubError for what the Hub refuses, StorageError for what an object store does.
    """
    expanded(given, error)
    of_address = [storage for storage in STORAGES.values() if str(given).startswith(storage.addresses)]
    for storage in of_address or STORAGES.values():
        if (found := storage.find(given, error, what)) is not None:
            if log.isEnabledFor(logging.INFO):  # the current folder may be gone
                commit = f", commit {found.revision}" if found.revision else ""
                log.info("%s %s: %s%s", what, given, found.path.absolute(), commit)
            return found
    raise error(nothing_there(given, what))


def parse_name(name: str | None) -> ModelName | None:
    """A record's `name` taken apart, whatever folders there are here; None for a path on this machine."""
    parsed = (storage.parse(name) for storage in STORAGES.values() if name is not None)
    return next((found for found in parsed if found is not None), None)


def pinned(name: str, revision: str | None) -> str:
    """A record's `name` with its revision, so that the same model is read again; a path stays as it is."""
    for storage in STORAGES.values():
        if revision is not None and storage.parse(name) is not None:
            return storage.pinned(name, revision)
    return name


def at_hand(name: str, revision: str | None, file: str) -> Path | None:
    """A file of the model that an adapter names, if it is on this machine already; nothing is asked or fetched."""
    if is_path(name):
        return path if (path := Path(name) / file).is_file() else None
    if STORAGES["hub"].parse(name) is None:
        return None
    from fossil_export.storage.hub._opening import cached_file

    return cached_file(name, revision, file)


__all__ = [
    "STORAGES",
    "ModelName",
    "Needed",
    "Origin",
    "Storage",
    "at_hand",
    "expanded",
    "fetch",
    "find_origin",
    "is_path",
    "parse_name",
    "pinned",
    "resolve",
]
