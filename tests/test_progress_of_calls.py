"""How far a call is: its steps, what a function that is told may do, and whose call a note is of."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import progress_tools
import public_tools
import pytest
from conftest import LoopbackHub

from fossil_export import Progress, _progress, convert, finish_merge, inspect, merge, merge_part, plan_merge, verify
from fossil_export._threads import in_context, in_order
from fossil_export.storage.hub._background import interruptible
from fossil_export.storage.hub._remote import HubFolder

made = public_tools.made
every_slab = progress_tools.every_slab


def told_by(call: Any) -> list[Progress]:
    told: list[Progress] = []
    call(told.append)
    return told


@pytest.mark.parametrize("every", [True, False])
def test_each_step_begins_and_ends_and_never_goes_back(
    every: bool, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if every:
        request.getfixturevalue("every_slab")
    calls: dict[str, Any] = {
        "merging": lambda progress: merge(made / "adapter", tmp_path / "out", progress=progress),
        "reading for SHA-256": lambda progress: finish_merge(
            plan_merge(made / "adapter"), tmp_path / "parts", hash=True, progress=progress
        ),
        "comparing": lambda progress: verify(made / "merged", level="weights", progress=progress),
        "measuring the updates": lambda progress: inspect(made / "adapter", progress=progress),
        "writing": lambda progress: convert(made / "adapter", tmp_path / "lora", to="lora", progress=progress),
        "planning": lambda progress: plan_merge(made / "adapter", progress=progress),
    }
    merge_part(plan_merge(made / "adapter"), tmp_path / "parts", (1, 1))
    for step, call in calls.items():
        found = [one for one in told_by(call) if one.step == step and one.total is not None]
        assert found[0].done == 0 and found[-1].done == found[-1].total and found[-1].fraction == 1.0, step
        assert [one.done for one in found] == sorted(one.done for one in found)
        assert len({(one.total, one.unit) for one in found}) == 1


@pytest.mark.usefixtures("every_slab")
def test_a_function_is_called_by_one_thread_at_a_time(made: Path, tmp_path: Path) -> None:
    inside, threads, most = [0], set(), [0]

    def tell(now: Progress) -> None:
        inside[0] += 1
        threads.add(threading.get_ident())
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.002)
        inside[0] -= 1

    merge(made / "adapter", tmp_path / "out", progress=tell)
    assert most == [1] and len(threads) > 1


@pytest.mark.parametrize("problem", [OSError("mine"), ValueError("mine"), KeyboardInterrupt(), StopIteration("mine")])
@pytest.mark.usefixtures("every_slab")
def test_what_the_function_raises_comes_out_and_nothing_is_left(
    problem: BaseException, made: Path, tmp_path: Path
) -> None:
    """An OSError, too, which is no fault of the disk's."""

    def tell(now: Progress) -> None:
        if now.done and now.unit == "B":
            raise problem

    for call in (
        lambda: merge(made / "adapter", tmp_path / "out", progress=tell),
        lambda: verify(made / "merged", level="weights", progress=tell),
    ):
        with pytest.raises(type(problem)) as caught:
            call()
        assert caught.value is problem
    assert list(tmp_path.iterdir()) == []


def test_a_call_within_the_function_is_another_call(made: Path, tmp_path: Path) -> None:
    steps: list[str] = []

    def tell(now: Progress) -> None:
        steps.append(now.step)
        if len(steps) < 50:
            plan_merge(made / "adapter")

    merge(made / "adapter", tmp_path / "out", progress=tell)
    assert len(steps) < 50


def test_a_call_without_progress_is_silent(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    merge(made / "adapter", tmp_path / "out")
    assert capsys.readouterr() == ("", "")
    merge(made / "adapter", tmp_path / "other", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "merging: 100%" in said.err and "B/s" in said.err
    assert not [one for one in recwarn if "tqdm" in str(one.category).lower()]


def test_a_note_is_a_line_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with _progress.showing(True):
        step = _progress.begin("merging", 10, "B")
        _progress.note("a worker is \x1b gone")
        step(10)
    assert "a worker is \\x1b gone\n" in written.getvalue() and "merging: 100%" in written.getvalue()


def test_a_thread_tells_what_happened_to_the_call_that_it_works_for_and_no_other() -> None:
    told: list[Progress] = []
    with _progress.showing(told.append):
        _progress.begin("fetching", 10, "B")
        for run in (in_context(_progress.note), _progress.note):  # the second one is of some other call
            thread = threading.Thread(target=run, args=(f"note {len(told)}",))
            thread.start()
            thread.join()
    assert told[1:] == [Progress("fetching", 0, 10, "B", "note 1")]
    _progress.note("nobody is told")


def test_headers_and_downloads_from_the_hub_tell_their_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HubFolder("ada/base", "0" * 40, {})
    monkeypatch.setattr(folder, "_header", _progress.note)
    told: list[Progress] = []
    with _progress.showing(told.append), ThreadPoolExecutor(2) as pool:
        folder.headers(["a header"])
        interruptible(lambda: _progress.note("a download"))
        list(in_order(pool, [lambda: _progress.note("a block")], ahead=1))
    assert [one.note for one in told] == ["a header", "a download", "a block"]


def test_a_fetch_from_the_hub_is_a_step(hosted: LoopbackHub, tmp_path: Path) -> None:
    told = told_by(lambda progress: merge("ada/adapter", tmp_path / "out", progress=progress))
    fetched = [one for one in told if one.step.startswith("fetching ") and one.unit == "B"]
    assert any("model-0" in one.step for one in fetched)
    for step in {one.step for one in fetched}:
        last = [one for one in fetched if one.step == step][-1]
        assert last.done == last.total, last
    steps = progress_tools.steps_of(told)
    assert steps.index("planning") < max(map(steps.index, {one.step for one in fetched})) < steps.index("merging")
