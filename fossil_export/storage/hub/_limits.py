"""How long the Hub asks to wait before the next request, and the waiting."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from fossil_export._progress import note
from fossil_export.storage.hub import _client as client

LONGEST = 305.0
"""Seconds that are waited at once for a limit to end; the Hub counts requests over windows of five minutes, about."""
WAITS = 10
"""How often that is done for one step, which may be many requests."""

_ROUNDING = 1.0
"""The Hub tells whole seconds."""

# A member of the lists of draft-ietf-httpapi-ratelimit-headers-09: "name";key=value;… and on the Hub two names.
_MEMBER = re.compile(r'"[^"]*"\s*(?:;\s*"[^"]*"\s*)?((?:;\s*[a-z]+\s*=\s*[^;,]*)*)')
_PARAMETER = re.compile(r";\s*([a-z]+)\s*=\s*(\d+)")


def asked_pause(problem: BaseException) -> float:
    """The seconds that an answer of the Hub asks to wait, 0.0 if it does not say. `problem` is of the Hub's client."""
    response = getattr(problem, "response", None)
    return 0.0 if response is None else told_pause(response.status_code, response.headers)


def told_pause(status: int, headers: Mapping[str, str]) -> float:
    """The same of the status and the headers (in lower or mixed case, as the client's are) of an answer.

    `RateLimit` is on every answer, and is the reason of a refusal only if nothing remains of it; `Retry-After` has
    seconds or a date. The longer of both counts.
    """
    pause = _until(headers.get("Retry-After", "").strip()) if status >= 400 else 0.0
    if status == 429:
        windows = [told["w"] for told in _members(headers.get("RateLimit-Policy", "")) if "w" in told]
        spent = [told for told in _members(headers.get("RateLimit", "")) if told.get("r") == 0]
        resets = [told.get("t", max(windows, default=0)) + _ROUNDING for told in spent]
        pause = max([pause, *resets])
    return pause


def wait(seconds: float) -> None:
    """Wait, with a word about it if it takes long. An interrupt ends it."""
    if seconds >= 5:
        note(f"the Hub asks for fewer requests; waiting {seconds:.0f} seconds, until {_clock(seconds)}")
    time.sleep(seconds)


def when_to_return(seconds: float) -> str:
    """What to tell whoever would have to wait so long."""
    if seconds <= 0:
        return "the Hub asks for fewer requests; wait a few minutes and run the same command again"
    length = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"the Hub asks for fewer requests, and for a pause of {length}; run the same command after {_clock(seconds)}"


def notice() -> None:
    """From now on, each of our requests that the Hub answers with a time to wait raises at once, and the caller waits.
    The client alone would wait for any time, in silence, five times. Requests of others are left as they are."""
    from huggingface_hub import get_session

    hooks = getattr(get_session(), "event_hooks", {}).get("response")  # before 1.0 the client does not wait
    if hooks is not None and _end not in hooks:
        hooks.append(_end)


def _end(response: Any) -> None:
    agent = response.request.headers.get("User-Agent", "")
    ours = client.LIBRARY in agent or "hf_hub/" not in agent  # to the storage, the client does not say who it is
    if ours and told_pause(response.status_code, response.headers) > 0:
        from huggingface_hub.utils import hf_raise_for_status

        response.read()
        hf_raise_for_status(response)


def _until(told: str) -> float:
    """The seconds of a Retry-After."""
    if told.isdecimal() and told.isascii():
        return float(told[:9])
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):  # none, nonsense, or a date without a zone
        return 0.0


def _members(told: str) -> list[dict[str, int]]:
    return [{key: int(value[:9]) for key, value in _PARAMETER.findall(one[1])} for one in _MEMBER.finditer(told)]


def _clock(seconds: float) -> str:
    """The time of day, here, in so many seconds."""
    then = datetime.now() + timedelta(seconds=min(seconds, 1e8))
    return then.strftime("%H:%M:%S" if seconds < 120 else "%H:%M" if seconds < 43_200 else "%Y-%m-%d %H:%M")
