"""How many requests the Hub takes from one user in one window, told on each of its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW = 300
"""Seconds, from the first request in it."""


@dataclass
class Limiter:
    """By kind of request ("api", "resolvers", "pages") and user. `quotas` may be changed at any time."""

    quotas: dict[str, int] = field(default_factory=lambda: {"api": 1000, "resolvers": 5000, "pages": 200})
    window: float = WINDOW
    clock: Callable[[], float] = time.monotonic
    is_on: bool = False  # else it counts nothing, and tells that all is left
    refused: int = 0
    _begun: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def take(self, path: str, who: str) -> tuple[bool, dict[str, str]]:
        """Whether the request may pass, and the headers of its answer."""
        kind = "resolvers" if "/resolve/" in path or "/resolve-cache/" in path else "api" if _is_api(path) else "pages"
        quota, now = self.quotas[kind], self.clock()
        start, used = self._begun.get((kind, who), (now, 0))
        if now - start >= self.window:
            start, used = now, 0
        allowed = used < quota or not self.is_on
        if self.is_on:
            self._begun[kind, who] = (start, used + allowed)
            self.refused += not allowed
        left, reset = max(0, quota - used - 1), int(self.window - (now - start))
        told = {"RateLimit": f'"{kind}";r={left};t={reset}'}
        return allowed, told | {"RateLimit-Policy": f'"fixed window";"{kind}";q={quota};w={int(self.window)}'}


def _is_api(path: str) -> bool:
    return path.startswith("/api/") or ".git/" in path
