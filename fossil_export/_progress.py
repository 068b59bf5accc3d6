"""How far a call is: every step of it, told in one way to a bar, to a function of the caller's, or to nobody.

Who is told is known to the thread that the call runs in (`showing`), so that planning, fetching and whatever else is
deep inside can `begin` a step without a parameter through all that lies between. A step may go on from any thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, Union

from fossil_export._arguments import checked
from fossil_export._shown import printable

if TYPE_CHECKING:
    from typing import ParamSpec

    P = ParamSpec("P")

R = TypeVar("R")
T = TypeVar("T")

EVERY = 0.1
"""Seconds between two calls of the same step, but for its first and its last."""


@dataclass(frozen=True)
class Progress:
    """How far a call is, as a function given as `progress=` is told.

    Attributes:
        step: What is being done, in words: "merging", "fetching model.safetensors".
        done: How much of this step is done by now, in `unit`; it never gets less within a step.
        total: How much the step has in all; None for a step whose length nobody knows.
        unit: What is counted: "B" for bytes, "tensors", "modules", "prompts", "files"; "" if nothing is.
        note: A line on something that happened meanwhile, such as a worker that was lost; "" in most calls.

    Example:
        >>> from fossil_export import Progress
        >>> Progress("merging", done=5, total=20, unit="B").fraction
        0.25
    """

    step: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """The share of the step that is done, from 0 to 1; None if its length is not known."""
        return min(1.0, self.done / self.total) if self.total else None


Shown = Union[bool, Callable[[Progress], object]]  # noqa: UP007  Python 3.10 cannot join them while it runs
"""What `progress=` may be: True for a bar, a function that is called with a `Progress`, False for neither."""


class StoppedError(BaseException):
    """The caller's function has raised. No `Exception`, so that nothing takes it for a fault of a file or the Hub."""


class _Told:
    """Who is told in one call, by one thread at a time."""

    def __init__(self, tell: Callable[[Progress], object]) -> None:
        self._tell = tell
        self.lock = threading.RLock()
        self.problem: BaseException | None = None
        self.is_over = False
        self.last = Progress("")

    def __call__(self, state: Progress) -> None:
        with self.lock:
            self.go_on()
            if self.is_over:  # a download that was interrupted, and left to itself
                return
            self.last = replace(state, note="")
            token = _told.set(None)  # a call of ours in the caller's function is another call
            try:
                self._tell(state)
            except BaseException as problem:
                self.problem = problem
                if isinstance(problem, Exception):
                    raise StoppedError from problem
                raise
            finally:
                _told.reset(token)

    def go_on(self) -> None:
        """Raise again if the caller's function has raised, whoever passed over that."""
        if self.problem is not None:
            raise StoppedError from self.problem


_told: ContextVar[_Told | None] = ContextVar("fossil_export_told", default=None)


class Step:
    """Called with how much more is done, from any thread."""

    def __init__(self, told: _Told | None, name: str, total: int | None, unit: str) -> None:
        self._told, self._state, self._next = told, Progress(name, 0, total, unit), 0.0
        self._done = 0
        self._tell()

    def __call__(self, count: int = 1) -> None:
        if self._told is None:
            return
        with self._told.lock:
            self._told.go_on()
            self._done += count
            is_last = self._state.total is not None and self._done >= self._state.total > self._state.done
            if is_last or time.monotonic() >= self._next:
                self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            total = self._state.total
            self._state = replace(self._state, done=self._done if total is None else min(self._done, total))
            self._next = time.monotonic() + EVERY
            self._told(self._state)


def begin(name: str, total: int | None = None, unit: str = "") -> Step:
    """Tell of a new step; what it returns is to be called as it goes on. Without `total` it has no measure."""
    return Step(_told.get(), name, total, unit)


def note(line: str) -> None:
    """Tell what happened meanwhile, in this thread or in one that was given its context (`_threads.in_context`); the
    step goes on."""
    if (told := _told.get()) is not None:
        told(replace(told.last, note=line))


def counted(every: Iterable[T], name: str, total: int, unit: str) -> Iterator[T]:
    """`every`, a step of which each is one."""
    step = begin(name, total, unit)
    for one in every:
        yield one
        step(1)


class showing:
    """What begins in the block is shown as `progress` says; False leaves it to whoever called the caller.

    What the caller's function raises stops the work and comes out of the block as it was. Raises TypeError for what is
    neither a bool nor a function.
    """

    def __init__(self, progress: Shown) -> None:
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress is {progress!r}, expected True, False or a function that takes a Progress")
        self._bar = Bar() if progress is True else progress if isinstance(progress, Bar) else None
        self._told = _Told(self._bar or progress) if callable(self._bar or progress) else None  # type: ignore[arg-type]

    def __enter__(self) -> showing:
        if self._told is not None:
            self._token = _told.set(self._told)
        return self

    def __exit__(self, kind: object, problem: BaseException | None, traceback: object) -> None:
        if self._told is None:
            return
        _told.reset(self._token)
        with self._told.lock:
            self._told.is_over = True
            if self._bar is not None:
                self._bar.close()
        wrong = self._told.problem
        if wrong is not None and wrong is not problem:
            raise wrong from wrong.__cause__


def reporting(function: Callable[P, R]) -> Callable[P, R]:
    """A function with steps that are shown as its `progress=` says, and arguments that are looked at first."""
    run = checked(function)

    @wraps(function)
    def told(*arguments: P.args, **options: P.kwargs) -> R:
        with showing(options.get("progress", False)):  # type: ignore[arg-type]
            return run(*arguments, **options)

    return told


class Bar:
    """A bar of tqdm's for each step: a widget in a notebook, else a line on stderr. With `leave` those that count stay
    there when they are done; steps that are over at once are never shown."""

    def __init__(self, leave: bool = True) -> None:
        self._leave = leave
        self._shown: Progress | None = None
        self._bar: Any = None

    def __call__(self, state: Progress) -> None:
        if state.note:
            _tqdm().write(printable(state.note), file=sys.stderr)
        if not state.step:
            return
        of = replace(state, done=0, note="")
        if self._bar is None or of != self._shown:
            self.close()
            self._shown = of
            counts = state.total is not None
            self._bar = _tqdm()(
                total=state.total,
                desc=printable(state.step),
                unit=state.unit if state.unit == "B" else f" {state.unit}",
                unit_scale=state.unit == "B",
                bar_format=None if counts else "{desc} …",
                leave=self._leave and counts,
                delay=0 if state.unit == "B" or not counts else 0.5,
                file=sys.stderr,
            )
        if state.done > self._bar.n:
            self._bar.update(state.done - self._bar.n)

    def close(self) -> None:
        """The step is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm() -> Any:
    """The bars that fit here. Without ipywidgets a notebook has lines of text, and nobody need be warned of it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm
