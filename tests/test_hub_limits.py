"""Limits that the Hub tells: waited for up to its window, in one place, and never in silence."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import push_fault_tools
import pytest
from conftest import ADA, interruptible
from hub_tools import cli, content
from huggingface_hub.utils import build_hf_headers, http_backoff
from loopback import Fault, LoopbackHub, environment
from push_fault_tools import WRITING, run, untouched, whole

from fossil_export import merge, push
from fossil_export.storage.hub import _errors
from fossil_export.storage.hub import _limits as limits

arguments = push_fault_tools.arguments
SPENT = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
LONG = {"RateLimit": '"api";r=0;t=3599', "RateLimit-Policy": '"fixed window";"api";q=500;w=3600'}
PAST = re.compile(
    r"the Hub asks for fewer requests, and for a pause of 60 minutes; run the same command after \d\d:\d\d"
)


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.lines: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(limits, "time", SimpleNamespace(sleep=found.sleep))
    monkeypatch.setattr(
        "fossil_export.commands._command.progress", lambda: lambda now: now.note and found.lines.append(now.note)
    )
    return found


@pytest.mark.parametrize(
    "status, headers, seconds",
    [
        (429, SPENT, 56),
        (429, {"RateLimit": '"api";r=0;t=55'}, 56),
        (429, {"RateLimit": '"api"; r=0; t=55'}, 56),
        (429, SPENT | {"Retry-After": "90"}, 90),
        (429, SPENT | {"Retry-After": "1"}, 56),
        (429, {"Retry-After": "7", "RateLimit": '"api";r=12;t=55'}, 7),  # much remains, so that is not the reason
        (429, {"RateLimit": '"pages";r=9;t=200, "api";r=0;t=30'}, 31),
        (429, {"RateLimit": '"api";r=0', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 301),
        (429, {"RateLimit": '"api";r=0', "RateLimit-Policy": '"api";q=500;w=60;pk=:abc:'}, 61),
        (429, {"RateLimit": "nonsense", "Retry-After": "soon"}, 0),
        (429, {"Retry-After": "-5"}, 0),
        (429, {}, 0),
        (503, {"Retry-After": "4"}, 4),
        (503, SPENT, 0),
        (200, SPENT | {"Retry-After": "4"}, 0),
    ],
)
def test_what_the_headers_ask_for(status: int, headers: dict[str, str], seconds: float) -> None:
    assert limits.told_pause(status, headers) == seconds


def test_a_date_to_retry_after() -> None:
    then = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert 90 < limits.told_pause(429, {"Retry-After": format_datetime(then, usegmt=True)}) <= 100
    then -= timedelta(hours=1)
    assert limits.told_pause(429, {"Retry-After": format_datetime(then, usegmt=True)}) == 0


@pytest.mark.parametrize("way", ["push", "stream"])
def test_every_request_of_a_publication_waits_for_its_limit(
    way: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]], clock: Clock
) -> None:
    command = arguments(way)
    faults = [Fault(*place, status=429, headers=SPENT) for place in WRITING.values()]
    faults.append(Fault("PUT", "^/storage/", status=503, headers={"Retry-After": "56"}))
    for fault in faults:
        hosted.fault(fault)
    run(command)
    assert [fault.times for fault in faults] == [0] * len(faults) and whole(hosted)
    # Of files that go side by side the first that must wait ends the step.
    assert set(clock.waits) == {56} and len(clock.waits) >= len(faults) - 3
    assert {line.partition(", until")[0] for line in clock.lines} == {
        "the Hub asks for fewer requests; waiting 56 seconds"
    }


def test_every_request_of_a_merge_waits_for_its_limit(hosted: LoopbackHub, tmp_path: Path, clock: Clock) -> None:
    places = [("GET", "^/api/models/ada/base$"), ("GET", "/tree/"), ("HEAD", "/resolve/"), ("GET", "/resolve-cache/"),
              ("GET", "/resolve/.*safetensors"), ("GET", "/cdn/")]  # fmt: skip
    faults = [Fault(*place, status=429, headers=SPENT) for place in places]
    for fault in faults:
        hosted.fault(fault)
    merge("ada/adapter", tmp_path / "merged")
    assert [fault.times for fault in faults] == [0] * len(faults) and set(clock.waits) == {56}


def test_a_hub_that_counts(hosted: LoopbackHub, models: Path, tmp_path: Path, clock: Clock) -> None:
    """Merged, published and read again with a few requests in each five minutes."""
    merge(models / "adapter", tmp_path / "here", base=models / "base")
    limiter = hosted.limiter
    limiter.is_on, limiter.clock = True, lambda: clock.now
    limiter.quotas |= {"api": 8, "resolvers": 12}
    merge("ada/adapter", tmp_path / "merged")
    push(tmp_path / "merged", "ada/new")
    assert limiter.refused > 2 and clock.now > 600 and max(clock.waits) <= 301
    assert whole(hosted)
    ours = content(tmp_path / "here")
    assert {name: data for name, data in content(tmp_path / "merged").items() if name != "fossil_export.json"} == {
        name: data for name, data in ours.items() if name != "fossil_export.json"
    }


@pytest.mark.parametrize("name", sorted(set(WRITING) - {"put"}))
def test_more_than_a_window_is_not_waited(
    name: str, hosted: LoopbackHub, arguments: Callable[[str], list[str]], clock: Clock
) -> None:
    """Of some requests the client itself would wait for that hour, five times, and say nothing."""
    command = arguments("push")
    hosted.fault(Fault(*WRITING[name], status=429, headers=LONG, times=None))
    hosted.reset_log()
    assert PAST.search(run(command, 1).stderr) and untouched(hosted)
    asked = [seen for seen in hosted.log if seen.status == 429]
    assert 1 <= len(asked) <= (3 if name == "verify" else 1) and clock.waits == []  # of files that go side by side


def test_a_limit_that_never_ends(hosted: LoopbackHub, clock: Clock) -> None:
    hosted.fault(Fault("GET", "^/api/models/ada/adapter$", status=429, headers=SPENT, times=None))
    line = cli("inspect", "ada/adapter", code=1).stderr
    assert "asks for fewer requests, and for a pause of 56 seconds; run the same command after" in line
    assert clock.waits == [56] * limits.WAITS


def test_requests_of_others_in_this_process_are_left_alone(hosted: LoopbackHub, clock: Clock) -> None:
    cli("inspect", "ada/adapter")
    hosted.fault(fault := Fault("GET", "/tree/", status=429, headers=SPENT))
    answer = http_backoff("GET", f"{hosted.endpoint}/api/models/ada/adapter/tree/main", headers=build_hf_headers())
    assert answer.status_code == 200 and fault.times == 0 and clock.waits == []


def test_the_terminal_is_told_and_an_interrupt_ends_the_wait(hosted: LoopbackHub, tmp_path: Path) -> None:
    hosted.fault(Fault("GET", "^/api/models/ada/adapter$", status=429, headers={"Retry-After": "250"}, times=None))
    ours, theirs = pty.openpty()
    with interruptible():
        child = subprocess.Popen(
            [sys.executable, "-m", "fossil_export", "inspect", "ada/adapter"],
            env=environment(hosted, tmp_path / "home of child", ADA),
            stderr=theirs,
            stdout=subprocess.PIPE,
        )
    os.close(theirs)
    told = b""
    while b"until" not in told:
        told += os.read(ours, 1000)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) in (1, 130)
    assert re.search(rb"the Hub asks for fewer requests; waiting 250 seconds, until \d\d:\d\d", told)
    os.close(ours)


def test_patience_with_a_failing_hub_is_not_spent_by_the_waits_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        def __init__(self, status: int, headers: dict[str, str]) -> None:
            self.response = SimpleNamespace(status_code=status, headers=headers, url=_errors.endpoint())

    now = [100.0]
    monkeypatch.setattr(_errors, "monotonic", lambda: now[0])
    trouble = _errors.Trouble()
    assert trouble.may_go_on(Failed(503, {}))
    assert trouble.may_go_on(Failed(429, SPENT))
    now[0] += 59
    assert trouble.may_go_on(Failed(503, {}))
    now[0] += 70
    assert not trouble.may_go_on(Failed(503, {}))
