"""What tests do while a call is at work: they are told of every slab, and act when its bytes come."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fossil_export import Progress, _progress


@pytest.fixture
def every_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is told, however soon it comes after the last one."""
    monkeypatch.setattr(_progress, "EVERY", 0.0)


def in_the_middle(act: Callable[[], object]) -> Callable[[Progress], object]:
    """`act` once bytes of the tensors are written or compared, each time that more are."""
    return lambda now: act() if now.unit == "B" and now.done else None


def steps_of(told: list[Progress]) -> list[str]:
    """Their names, in order, each once."""
    return list(dict.fromkeys(one.step for one in told))
