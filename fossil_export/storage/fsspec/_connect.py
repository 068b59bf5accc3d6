"""From a URL to fsspec's file system, with the credentials that its own configuration and environment have."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fossil_export._extras import OF_SCHEMES, Need, install, missing, needing, of_names, required
from fossil_export.errors import FossilExportError
from fossil_export.storage.fsspec._addresses import check_address, redacted, scheme_of
from fossil_export.storage.fsspec._errors import explained


def connect(address: str, error: type[FossilExportError], purpose: str = "reading") -> tuple[Any, str]:
    """The file system of a URL, and the path in it, without a slash at its end.

    Raises `error` for a URL that cannot be used and for a missing package, MissingExtraError without fsspec,
    StorageError for what the file system refuses.
    """
    check_address(address, error)
    scheme = scheme_of(address)
    with needing(*of_names(address)):
        core = required("fsspec.core", "fsspec", f"{purpose} {scheme}://")
    try:
        system, path = core.url_to_fs(address)
    except ImportError as problem:
        package = _package(str(scheme))
        if OF_SCHEMES.get(str(scheme)) == package:
            raise missing(f"{purpose} {scheme}://", Need(None, (package,))) from problem
        how = install((), [package])
        raise error(f"{redacted(address)}: fsspec needs {package} for {scheme}://: {how}") from problem
    except Exception as problem:
        raise explained(problem, address, "cannot be opened") from problem
    return system, str(path).rstrip("/")


def is_known(scheme: str) -> bool:
    """Whether fsspec, if it is installed, has a file system for `scheme`, be its own package installed or not."""
    try:
        registry = import_module("fsspec.registry")
    except ImportError:
        return False
    return scheme in registry.known_implementations or scheme in registry.registry


def _package(scheme: str) -> str:
    """What pip calls the package of a scheme."""
    known = import_module("fsspec.registry").known_implementations.get(scheme, {})
    module = str(known.get("class", scheme)).partition(".")[0]
    own = {"fsspec": str(known.get("err", scheme)), "pyarrow": "pyarrow"}
    return own.get(module, module)
