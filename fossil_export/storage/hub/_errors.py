"""What the Hub's client raises, in one line with the remedy. No message holds a token or a signed address."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from time import monotonic
from typing import TypeVar
from urllib.parse import urlsplit

from fossil_export.errors import FossilExportError, HubError
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub import _limits as limits
from fossil_export.storage.hub import _xet as xet
from fossil_export.storage.hub._answers import address_of, code_of, is_of_storage, is_page

T = TypeVar("T")


class NotThereError(HubError):
    """The Hub (or, offline, its cache) has no model of this name, or does not show it."""


ATTEMPTS = 5
PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
PATIENCE = 60.0
"""Seconds after which a Hub that answers, but only with errors, is given up. A limit that it tells is waited for."""

WITHOUT_XET = ", or with HF_HUB_DISABLE_XET=1 to go without hf_xet"
NOT_CACHED = "is not, or not wholly, in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or fetch the model first"

_SECRETS = re.compile(r"hf_\w{6,}|(?<=Bearer )\S+|(?<=\?)[^\s'\">]*=[^\s'\">]*|(?<=://)[^\s/@]+(?=@)")


def redacted(text: str) -> str:
    """`text` without tokens and passwords, and without the queries of addresses, which may be signed."""
    return _SECRETS.sub("…", text)


def endpoint() -> str:
    """The address of the Hub for people: HF_ENDPOINT, as the client read it, without a password."""
    return redacted(_endpoint())


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def check_client() -> None:
    """Raise HubError where the Hub's client is none that is supported, or refuses the settings that it is given."""
    client.check_version()
    try:
        import_module("huggingface_hub.constants")  # by this name, since the package itself prints what is wrong
    except ValueError as problem:
        line = _line(problem)
        raise HubError(
            f"the Hub's client refuses its settings ({line}); check the variables that begin with HF_"
        ) from problem


def explained(problem: BaseException, name: str, doing: str = "") -> FossilExportError:
    """The error to raise for `problem`, met while dealing with repository `name`; `doing` says at what."""
    if isinstance(problem, FossilExportError):
        return problem
    what = f"{name}: {doing}: " if doing else f"{name}: "
    page = f"{endpoint()}/{name}"
    causes = list(causes_of(problem))
    # Behind each of the client's errors is the HTTP library's own, which knows no more than the status.
    remedies = (_remedy(cause, page, bare) for bare in (False, True) for cause in causes)
    kind = NotThereError if any(map(_is_not_there, causes)) else HubError
    otherwise = (
        f"{_line(problem)}; check HF_ENDPOINT, HF_TOKEN, HF_HOME and HTTPS_PROXY, and run the same command again"
    )
    return kind(what + next(filter(None, remedies), otherwise))


def is_unreachable(problem: BaseException) -> bool:
    """Whether the Hub did not answer, or not sensibly: what is cached may then be used."""
    return any(status_of(cause) >= 500 or _is_network(cause) or _is_offline(cause) for cause in causes_of(problem))


def is_cut_off(problem: BaseException) -> bool:
    """Whether there was nobody to ask."""
    return any(map(_is_network, causes_of(problem)))


def is_conflict(problem: BaseException) -> bool:
    """Whether the branch has moved since its head was looked at."""
    return any(status_of(cause) in (409, 412) for cause in causes_of(problem))


def is_transient(problem: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    passing = (408, 429, 500, 502, 503, 504)
    return any(
        status_of(cause) in passing or _is_network(cause) or refused_by_storage(cause) for cause in causes_of(problem)
    )


def retried(run: Callable[[], T], name: str, doing: str = "", attempts: int = ATTEMPTS) -> T:
    """`run()`, again a few times where the Hub had trouble that its client gives up on. Raises as `explained` says.

    If the Hub says how long to wait, that is waited, unless it is longer than its windows (`limits.LONGEST`).
    """
    trouble = Trouble(attempts)
    while True:
        try:
            limits.notice()
            return run()
        except FossilExportError:
            raise
        except Exception as problem:
            if not (is_transient(problem) and trouble.may_go_on(problem)):
                raise explained(problem, name, doing) from problem
            if any(map(xet.is_xet, causes_of(problem))):
                client.renew_xet_session()
        trouble.rest()


class Trouble:
    """How often the Hub failed in one step, and how long to wait before the next of `attempts`."""

    def __init__(self, attempts: int = ATTEMPTS) -> None:
        self._left, self._once = attempts, 2
        self._limits = limits.WAITS
        self._pause = PAUSE
        self._next = 0.0
        self._until: float | None = None

    def may_go_on(self, problem: BaseException) -> bool:
        """Whether there is a next attempt after `problem`, which is transient."""
        causes = list(causes_of(problem))
        asked = max(map(limits.asked_pause, causes))
        if asked > 0:
            self._limits -= 1
            self._next = asked
            self._until = self._until and self._until + asked  # our patience is not spent by what it asked for
            return asked <= limits.LONGEST and self._limits >= 0
        now = monotonic()
        self._until = self._until or now + PATIENCE
        self._next, self._pause = self._pause, self._pause * 2
        self._left -= 1
        if any(xet.is_xet(cause) or refused_by_storage(cause) for cause in causes):
            # hf_xet has tried for minutes already, and a new signed address helps at once or not at all.
            self._once -= 1
            self._left = min(self._left, self._once)
        late = any(map(status_of, causes)) and not is_conflict(problem) and now + self._next > self._until
        return self._left > 0 and not late

    def rest(self) -> None:
        """Wait for as long as the last problem makes advisable."""
        limits.wait(self._next)


def causes_of(problem: BaseException) -> Iterator[BaseException]:
    """What lies behind `problem`, the cause before what it caused: the client wraps the telling error in others."""
    behind = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)
    if behind is not None:
        yield from causes_of(behind)
    yield problem


def status_of(problem: BaseException) -> int:
    response = getattr(problem, "response", None)
    return int(getattr(response, "status_code", 0) or 0) or xet.status_of(problem)


def refused_by_storage(problem: BaseException) -> bool:
    """Whether it was not the Hub that forbade it, but the host of its large files, which knows no tokens: a signed
    address that is too old, a clock that is wrong, a proxy."""
    response = getattr(problem, "response", None)
    by_host = response is not None and is_of_storage(response, _endpoint())
    by_xet = xet.is_xet(problem) and not xet.is_by_hub(problem)
    return status_of(problem) == 403 and (by_host or by_xet)


def errno_of(problem: BaseException | None) -> int | None:
    """The system's number of an error with a file or the disk."""
    found = problem.errno if isinstance(problem, OSError) else None
    return found if found is not None or problem is None else xet.errno_of(problem)


def _is_network(problem: BaseException) -> bool:
    if xet.is_xet(problem):
        return xet.is_unreachable(problem)
    return not _is_offline(problem) and (client.is_network(problem) or isinstance(problem, ConnectionError))


def _is_not_there(problem: BaseException) -> bool:
    return type(problem).__name__ in ("RepositoryNotFoundError", "HFValidationError") or _is_offline(problem)


def _is_offline(problem: BaseException) -> bool:
    return type(problem).__name__ == "OfflineModeIsEnabled"


def _remedy(problem: BaseException, page: str, bare: bool) -> str | None:
    """What to do about one error, of the HTTP library only if `bare`; None if it tells nothing."""
    from huggingface_hub import constants, errors

    by_xet = xet.is_xet(problem)
    by_storage = by_xet and not xet.is_by_hub(problem)
    status = status_of(problem) if by_xet or bare or isinstance(problem, errors.HfHubHTTPError) else 0
    if status in (404, 405, 501) and re.search("/xet-(read|write)-token/", address_of(problem)):
        return f"the Hub shows no way to its Xet storage (status {status}); run the same command again{WITHOUT_XET}"
    if isinstance(problem, errors.GatedRepoError):
        return f"is gated; accept the licence at {page} and log in with `hf auth login`"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"has no such revision; see {page}/tree/main for its branches and tags"
    if client.is_missing_file(problem):
        return f"a file is missing there; see {page}/tree/main"
    if status == 401 and "Invalid credentials" in str(problem):
        return "the Hub does not know this token; log in again with `hf auth login`, or set HF_TOKEN"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return "no such model on the Hub, or it is private; check the name, or log in with `hf auth login`"
    if isinstance(problem, errors.HFValidationError):
        return f"is no name of a model on the Hub ({_line(problem).removesuffix('.')}); write user/repo"
    if status == 401 or isinstance(problem, errors.LocalTokenNotFoundError):
        return "the Hub wants to know who you are; log in with `hf auth login`, or set HF_TOKEN"
    if refused_by_storage(problem):
        host = "the Xet storage" if by_xet else f"the storage host {urlsplit(address_of(problem)).hostname}"
        code = ", ".join(filter(None, ("status 403", code_of(problem))))
        return (
            f"{host} refuses this ({code}), not the Hub itself; check this machine's clock and HTTPS_PROXY, and run "
            f"the same command again{WITHOUT_XET if by_xet else ''}"
        )
    if status == 403 and is_page(problem):
        return (
            f"{endpoint()} is refused (status 403) by a page that is not the Hub's; check HTTPS_PROXY and HF_ENDPOINT, "
            "and run the same command again"
        )
    if status == 403:
        return (
            "your token may not do that; take one that may (to publish, with write access) from "
            f"{endpoint()}/settings/tokens and log in with `hf auth login`{_said(problem)}"
        )
    if status == 429:
        return limits.when_to_return(limits.asked_pause(problem))
    if status in (409, 412):
        return f"somebody else changed it at the same time; run the same command again{_said(problem)}"
    if status >= 500 and by_storage:
        return (
            f"the Xet storage has trouble of its own (status {status}); run the same command again later{WITHOUT_XET}"
        )
    if status >= 500:
        return f"the Hub has trouble of its own (status {status}); run the same command again later"
    if status >= 400:
        return f"the Hub refuses this (status {status}){_said(problem)}; see {page}"
    if _is_offline(problem):
        return NOT_CACHED
    if by_storage and _is_network(problem):
        return (
            f"the Xet storage cannot be reached ({_line(problem)}); check the network and HTTPS_PROXY, and run the "
            f"same command again{WITHOUT_XET}"
        )
    if _is_network(problem):
        return (
            f"{endpoint()} cannot be reached ({_line(problem)}); check the network, HTTPS_PROXY and HF_ENDPOINT, "
            "and run the same command again"
        )
    if isinstance(problem, (json.JSONDecodeError, KeyError, TypeError, AttributeError)):
        return f"{endpoint()} answers, but not as the Hub does; check HTTPS_PROXY and HF_ENDPOINT"
    if errno_of(problem) == errno.ENOSPC:
        return "no room left on the disk; make some, or move the cache with HF_HOME"
    if isinstance(problem, OSError) and str(problem.filename).startswith(str(constants.HF_HUB_CACHE)):
        return f"{problem.filename}: {problem.strerror}; see to the Hub's cache, or move it with HF_HOME"
    if by_xet:
        return f"{_line(problem)}; run the same command again{WITHOUT_XET}"
    return None


def _said(problem: BaseException) -> str:
    """What the server itself had to say."""
    said = redacted(" ".join(str(getattr(problem, "server_message", None) or "").split()))
    return f" ({said})" if said else ""


def _line(problem: BaseException) -> str:
    """The first line of its message."""
    line = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
    return redacted(line)
