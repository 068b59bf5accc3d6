"""What goes wrong on purpose, and the log of what was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What goes wrong with the requests it matches; the first fault that has not run out is the one that happens.

    `times` and `skip` count down in place, so that `fault.times == 0` tells that it happened.
    """

    method: str | None = None
    path: str = ""  # searched in the unquoted path
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    times: int | None = 1  # None: for ever
    skip: int = 0  # let so many matching requests pass first
    # Close after so many body bytes: of the answer to a GET, or of what a POST or PUT sends, without effect or answer.
    cut_after: int | None = None
    reset: bool = False  # cut an answer with a TCP reset, not with an orderly end
    corrupt: bool = False  # one byte of the answer's body, or of the stored upload
    trickle: tuple[int, float] | None = None  # (bytes, seconds of rest after them)
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    lost: bool = False  # the request has its effect, the connection is closed without an answer


@dataclass
class Request:
    method: str
    path: str
    query: str
    has_token: bool
    status: int | None = None  # None: there was no answer
    sent: int = 0  # body bytes of the answer
    received: int = 0  # body bytes of the request
