"""Addresses of models on the Hub, taken apart by its client, or here for clients that cannot (before 1.20)."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from fossil_export.errors import FossilExportError
from fossil_export.storage.hub._errors import redacted

_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_FORM = "write hf://user/repo[@revision][/folder]"
_KIND = r"(?:(models|datasets|spaces|kernels|buckets)/)?"
_REVISION = r"(refs/(?:pr|convert)/[^/@]+|[^/]+)"
_OWN = re.compile(rf"{_KIND}([\w.-]+/[\w.-]+)(?:@{_REVISION})?(?:/((?:[^/]+/)*[^/]*))?")
_PAGE = re.compile(rf"{_KIND}([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|raw)/{_REVISION}(?:/((?:[^/]+/)*[^/]*))?)?/?")


def parsed(text: str, error: type[FossilExportError]) -> tuple[str, str, str | None, str]:
    """What an address names ("model", "dataset", …), its repository, revision and path within it. Raises `error`."""
    from huggingface_hub import constants

    try:
        from huggingface_hub import parse_hf_uri
    except ImportError:
        return _parsed(text, error)
    try:
        uri = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except ValueError as problem:
        why = " ".join(str(getattr(problem, "msg", problem)).split()).rstrip(".")
        raise error(f"{redacted(text)}: is no address of a model ({why}); {_FORM}") from problem
    return str(uri.type), str(uri.id), uri.revision, str(uri.path_in_repo).strip("/")


def _parsed(text: str, error: type[FossilExportError]) -> tuple[str, str, str | None, str]:
    """The same, as the client from 1.20 on reads it."""
    if text.startswith("hf://"):
        found = _OWN.fullmatch(text.removeprefix("hf://"))
    else:
        from huggingface_hub import constants

        address, hub = urlsplit(text), urlsplit(str(constants.ENDPOINT))
        ours = address.netloc == hub.netloc and address.path.startswith(f"{hub.path.rstrip('/')}/")
        path = unquote(address.path.removeprefix(hub.path.rstrip("/") if ours else ""))
        found = _PAGE.fullmatch(path.removeprefix("/")) if ours or address.hostname in _HOSTS else None
    if found is None:
        raise error(f"{redacted(text)}: is no address of a model; {_FORM}")
    kind, repository, revision, inside = found.groups()
    return (kind or "models").removesuffix("s"), repository, unquote(revision or "") or None, (inside or "").strip("/")
