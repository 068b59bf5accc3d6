"""What fsspec's file systems raise, in one line with the remedy.

Their libraries (botocore, aiohttp, Google's, Azure's) are no dependencies of ours: what they raise is told by the names
of its classes, and by what it has of an HTTP answer. No message holds a password, a key or a signed address.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fossil_export.errors import FossilExportError, StorageError, reason
from fossil_export.storage.fsspec._addresses import redacted, scheme_of

T = TypeVar("T")

ATTEMPTS = 5
PAUSE = 0.5
"""Seconds before the second attempt; each further pause is twice as long. The file systems' own attempts come first."""
PATIENCE = 60.0
"""Seconds after which there is no further attempt."""

_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError", "ProfileNotFound",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError", "RefreshError",
    "ClientAuthenticationError", "CredentialUnavailableError", "AuthenticationException", "MetadataRetrievalError",
}  # fmt: skip
_NETWORK = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
    "ServiceRequestError", "ServiceResponseError", "TransportError", "ProtocolError", "SSHException",
    "ResponseStreamingError",
}  # fmt: skip
_TIME = {"TimeoutError", "FSTimeoutError", "ConnectTimeoutError", "ReadTimeoutError", "ServerTimeoutError"}
_CERTIFICATE = {"SSLError", "ClientConnectorCertificateError", "ClientSSLError", "ClientConnectorSSLError"}
_PASSING = (408, 429, 500, 502, 503, 504)
_BUSY = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EBUSY)}  # s3fs's for 503 and 500


class CutShortError(ConnectionError):
    """An answer with fewer bytes than were asked for."""


def explained(problem: BaseException, address: str, doing: str = "cannot be read") -> FossilExportError:
    """The error to raise for `problem`, met at `address`."""
    if isinstance(problem, FossilExportError):
        return problem
    remedies = (_remedy(cause, address, doing) for cause in causes_of(problem))
    found = next(filter(None, remedies), None) or (
        f"{doing}: {_line(problem)}; check the address and fsspec's configuration, and run the same command again"
    )
    return StorageError(f"{redacted(address)}: {found}")


def causes_of(problem: BaseException) -> Iterator[BaseException]:
    """What lies behind `problem`, the cause before what it caused."""
    behind = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)
    if behind is not None:
        yield from causes_of(behind)
    yield problem


def is_transient(problem: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    causes = list(causes_of(problem))
    if any(_kinds(cause) & _CERTIFICATE for cause in causes):
        return False
    return any(
        _kinds(cause) & (_NETWORK | _TIME) or _status_of(cause) in _PASSING or getattr(cause, "errno", None) in _BUSY
        for cause in causes
    )


def retried(run: Callable[[], T], address: str, doing: str = "cannot be read", attempts: int = ATTEMPTS) -> T:
    """`run()`, again a few times if what failed may pass. Raises as `explained` says."""
    pause, until = PAUSE, time.monotonic() + PATIENCE
    while True:
        attempts -= 1
        try:
            return run()
        except FossilExportError:
            raise
        except Exception as problem:
            if any(_kinds(cause) & _TIME for cause in causes_of(problem)):
                attempts = min(attempts, 1)  # what waits for so long was tried several times already
            if attempts <= 0 or time.monotonic() + pause > until or not is_transient(problem):
                raise explained(problem, address, doing) from problem
        time.sleep(pause)
        pause *= 2


def _remedy(problem: BaseException, address: str, doing: str) -> str | None:
    kinds, status, scheme = _kinds(problem), _status_of(problem), scheme_of(address)
    if kinds & _CREDENTIALS or status == 401:
        return (
            f"there are no credentials for {scheme}:// ({_line(problem)}); log in as its own tools do, or set the "
            f"variables that they read"
        )
    if isinstance(problem, PermissionError) or status == 403:
        return f"access is denied ({_line(problem)}); check whose credentials are used, and what they may do there"
    if isinstance(problem, FileNotFoundError) or status == 404:
        return f"there is no such bucket, folder or file ({_line(problem)}); check the address"
    if kinds & _CERTIFICATE:
        return f"the certificate of its server is not trusted ({_line(problem)}); check the endpoint"
    if kinds & _TIME:
        return f"its server does not answer in time ({_line(problem)}); run the same command again"
    if isinstance(problem, CutShortError):
        return f"{doing}: {problem}; run the same command again"
    if kinds & _NETWORK:
        return f"its server cannot be reached ({_line(problem)}); check network, proxy and endpoint"
    if status in _PASSING or getattr(problem, "errno", None) in _BUSY:
        return f"its server is too busy ({_line(problem)}); run the same command again"
    return None


def _kinds(problem: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(problem).__mro__}


def _status_of(problem: BaseException) -> int:
    """The status of the HTTP answer that it came from; 0 if there was none."""
    answer = getattr(problem, "response", None)
    if isinstance(answer, dict):  # botocore's
        found = (answer.get("ResponseMetadata") or {}).get("HTTPStatusCode")
    else:
        found = getattr(problem, "status_code", None) or getattr(problem, "status", None)
        found = found or getattr(problem, "code", None) or getattr(answer, "status_code", None)
    try:
        return int(found or 0)
    except (TypeError, ValueError):
        return 0


def _line(problem: BaseException) -> str:
    text = reason(problem) if isinstance(problem, OSError) else str(problem)
    return redacted(next(iter(text.splitlines()), "").strip().rstrip(".") or type(problem).__name__)[:300]
