"""From a URL to a folder there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.errors import FossilExportError
from fossil_export.storage._local import LocalStorage
from fossil_export.storage._origin import ModelName, Origin, Storage
from fossil_export.storage._paths import nothing_there
from fossil_export.storage.fsspec._addresses import (
    LOCAL,
    OTHERS,
    SCHEMES,
    check_address,
    is_object_address,
    scheme_of,
)


class FsspecStorage(Storage):
    """Object stores, and whatever else fsspec has a file system for. Nothing of it is imported before an address is
    one."""

    addresses = tuple(f"{scheme}://" for scheme in SCHEMES)

    def find(self, given: str | Path, error: type[FossilExportError], what: str) -> Origin | None:
        """Raises StorageError for what the place refuses, `error` for an address that nothing is found at."""
        text = str(given)
        scheme = scheme_of(text)
        if "://" in text and "::" in text:
            check_address(text, error)
        if scheme is None or scheme in OTHERS:
            return None
        if scheme in LOCAL:
            found = LocalStorage().find(text.partition("://")[2] or "/", error, what)
            if found is None:
                raise error(nothing_there(text, what))
            return found
        if scheme not in SCHEMES:
            from fossil_export.storage.fsspec._connect import is_known

            if not is_known(scheme):
                return None
        check_address(text, error)
        return _open(text.rstrip("/"), error, what)

    def parse(self, name: str) -> ModelName | None:
        return ModelName(name) if is_object_address(name) else None


def _open(address: str, error: type[FossilExportError], what: str) -> Origin:
    from fossil_export.storage.fsspec._connect import connect
    from fossil_export.storage.fsspec._remote import Entry, RemoteFolder

    system, root = connect(address, error)
    found = _listing(system, root, address)
    file = None
    if set(found) == {root}:
        file = root.rpartition("/")[2]
        address, root = address[: -len(file) - 1], root[: -len(file) - 1]
        found = _listing(system, root, address)
    entries = {
        key[len(root) + 1 :]: Entry.of(info)
        for key, info in found.items()
        if key.startswith(f"{root}/") and info.get("type") != "directory" and not key.endswith("/")
    }
    if not entries or (file is not None and file not in entries):
        option = " with --base" if what == "base model" else ""
        raise error(f"{address}: no such {what} there; check the address, or name another{option}")
    folder = RemoteFolder(address, system, root, entries, _cache(address, entries))
    return Origin(f"{address}/{file}" if file else address, folder, file)


def _listing(system: Any, root: str, address: str) -> dict[str, Mapping[str, Any]]:
    """All files of a folder by their path in the file system; of a file just that one."""
    from fossil_export.storage.fsspec._errors import retried

    def run() -> dict[str, Mapping[str, Any]]:
        system.invalidate_cache()
        try:
            return {str(key).rstrip("/"): info for key, info in system.find(root, detail=True).items()}
        except FileNotFoundError:
            if "/" in root.strip("/"):  # a folder that is not there; else it is the bucket
                return {}
            raise

    # It has not worked yet, and its library has tried several times: what is wrong should be said soon.
    return retried(run, address, attempts=1)


def _cache(address: str, entries: Mapping[str, Any]) -> Path:
    """Where files of just this state of the folder are kept: another process that opens the same finds them."""
    listing = [(name, entry.size, entry.state) for name, entry in sorted(entries.items())]
    # What nothing tells from its next state is not kept for another process.
    own = os.urandom(16).hex() if any(not entry.state for entry in entries.values()) else ""
    digest = hashlib.sha256(repr((address, listing, own)).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fossil-export" / "objects" / digest / address.rpartition("/")[2]
