"""What is used of the Hub's client beyond its public functions; no other file of the package may.

Each of these is looked for before it is used: another version may have it no more, or under another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from typing import Any

from fossil_export.errors import HubError

FLOOR, WRITES, ABOVE = (0, 34), (1, 23), (3, 0)
"""The first version that reads models here, the first that publishes them, and the first that is not known."""
SUPPORTED = f"huggingface-hub>={FLOOR[0]}.{FLOOR[1]},<{ABOVE[0]}"
"""The versions that the tests are run with, at both ends. transformers 4.57 wants it below 1.0."""
PUBLISHES = f"huggingface-hub>={WRITES[0]}.{WRITES[1]},<{ABOVE[0]}"

LIBRARY = "fossil-export"
"""What the client is told to send as the name of whoever uses it."""

LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx", "httpx2")
"""Loggers that are told signed addresses. The client's 1.x speaks through httpx, its 2.x through httpx2."""

_MODE, _IGNORED, _UPLOADED, _REMOTE = "_upload_mode", "_should_ignore", "_is_uploaded", "_remote_oid"
"""Where an addition (CommitOperationAdd) keeps what became of its upload."""


def check_version() -> None:
    """Raise HubError for a client that was not there when this was written, or no longer: pip lets one be put here."""
    if not FLOOR <= (_version() or (0, 0)) < ABOVE:
        raise _unknown("too old or too new")


def check_publishing() -> None:
    """Raise HubError for a client that reads models, but cannot do all that publishing them takes."""
    if (_version() or (0, 0)) < WRITES:
        raise HubError(
            f"huggingface_hub {version('huggingface_hub')} reads models, but is too old to publish them with; "
            "transformers before 5 wants such an old one, so publish from another environment: "
            f"pip install '{PUBLISHES}'"
        )


def _version() -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version("huggingface_hub"))
    return (int(found[1]), int(found[2])) if found is not None else None


def check_additions() -> None:
    """Raise HubError where the client's additions are others than those known here; to be called before any upload."""
    from huggingface_hub import CommitOperationAdd

    known = {field.name for field in fields(CommitOperationAdd)}
    if missing := [name for name in (_MODE, _IGNORED, _UPLOADED, _REMOTE) if name not in known]:
        raise _unknown(f"CommitOperationAdd has no {', '.join(missing)}")


def is_large(addition: Any) -> bool:
    """Whether the Hub keeps the file of an addition that was uploaded outside of git."""
    mode = getattr(addition, _MODE)
    if mode not in ("lfs", "regular"):
        raise _unknown(f"{addition.path_in_repo} has the upload mode {mode!r}")
    return bool(mode == "lfs")


def is_ignored(addition: Any) -> bool:
    """Whether the repository's .gitignore leaves the file out."""
    return bool(getattr(addition, _IGNORED))


def mark_uploaded(addition: Any) -> None:
    """Note that the Hub has the content of a large file already, so that the client asks and sends nothing."""
    for name, value in ((_MODE, "lfs"), (_IGNORED, False), (_UPLOADED, True)):
        setattr(addition, name, value)


def forget_remote(addition: Any) -> None:
    """Forget that the branch held the same file when it was uploaded, for which the client would leave it out."""
    setattr(addition, _REMOTE, None)


def renew_xet_session() -> None:
    """Let the client begin anew with hf_xet, whose sessions before 1.8 repeat a failure instead of the request."""
    try:
        renew = import_module("huggingface_hub.utils._xet").abort_xet_session
    except (ImportError, AttributeError):  # then the next attempt is told the same, and the error as it is
        return
    renew()


def is_offline() -> bool:
    """Whether the client is told to ask the Hub nothing."""
    from huggingface_hub import constants

    ask = getattr(constants, "is_offline_mode", None)  # from 1.0 on
    return bool(ask() if ask is not None else constants.HF_HUB_OFFLINE)


def listing(repository: str, commit: str) -> list[Any] | None:
    """The files of a model whose copy is in the cache; None if nothing there tells (always so before 1.23)."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return list(get_cached_repo_tree(repository, revision=commit))
    except CachedRepoTreeNotFoundError:  # another program, or an older client, has fetched it
        return None


@contextmanager
def streamed(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to a GET and the pieces of its content. It is asked once: whoever asks repeats it. Raises what the
    client's HTTP library does (requests before 1.0), and HfHubHTTPError for a refusal."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    try:
        from huggingface_hub.utils import http_stream_backoff
    except ImportError:
        with get_session().get(url, headers=headers, stream=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response, response.iter_content(1 << 16)
        return
    once: dict[str, Any] = {"retry_on_exceptions": (), "retry_on_status_codes": ()}
    with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=timeout, **once) as response:
        hf_raise_for_status(response)
        yield response, response.iter_bytes()


def is_missing_file(problem: BaseException) -> bool:
    """Whether the Hub has no such file at that commit. One that is not in the cache is something else."""
    from huggingface_hub import errors

    return isinstance(problem, errors.EntryNotFoundError) and not isinstance(problem, errors.LocalEntryNotFoundError)


def is_network(problem: BaseException) -> bool:
    """Whether the client's HTTP library, which is no dependency of ours, got no answer, or only a part of one."""
    names = {kind.__name__ for kind in type(problem).__mro__}
    if "RequestException" in names:  # requests, before 1.0
        return bool(names & {"ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"})
    return bool(names & {"TransportError", "TimeoutException", "NetworkError"})


def _unknown(what: str) -> HubError:
    return HubError(
        f"huggingface_hub {version('huggingface_hub')} is not known here ({what}); "
        f"install one that is tested: pip install '{SUPPORTED}'"
    )
