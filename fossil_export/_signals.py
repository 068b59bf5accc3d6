"""How the command ends when it is told to: Ctrl-C with one word and exit code 130, `kill` with 143, a closed terminal
with 129. The library itself takes no signals."""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import time
from typing import Any, NoReturn

PATIENCE = 10.0
"""Seconds for cleaning up. What hangs in native code, or swallows exceptions, is cut off then."""

AGAIN = 1.0
"""Seconds after which one more signal ends the process at once. Before that it is the same one, passed on twice."""

_TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal came. Whoever does not know this class lets it pass, and Python then exits with its code, in silence."""


class Signals:
    """`number` is the signal that this process was told to end with, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._is_over = self._is_lost = self._is_said = False

    def take(self) -> None:
        """From here on signals raise Stopped in the main thread; those that the parent had ignored stay ignored."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._main = _thread.get_ident()
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._not_raised
        os.register_at_fork(before=self._hold, after_in_parent=self._free, after_in_child=self._let_go)
        for number in _TAKEN:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._came)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _thread.start_new_thread(self._watch, (reading,))

    def over(self) -> None:
        """The command has ended, well or not: clean up what goes with the process; after a signal, end it."""
        try:
            _close_scratch()
        finally:
            self._is_over = True
            if self.number:
                os._exit(128 + self.number)  # foreign threads and exit handlers are not waited for

    def _came(self, number: int, frame: object) -> None:
        if self._is_over:
            self._leave(number)
        if self.number and not self._is_lost:
            return
        self._is_lost = False
        if not self.number:
            self.number = number
            self._say(number)
        raise Stopped(128 + self.number)

    def _say(self, number: int) -> None:
        """One word, at once; what anybody says from now on (threads, native code, destructors) is of no interest."""
        self._is_said = True
        word = b"Aborted!\n" if number == signal.SIGINT else b""
        with contextlib.suppress(OSError):
            if word:
                os.write(2, b"\n" + word if os.isatty(2) else word)  # after the ^C
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, 2)
            os.close(nowhere)

    def _leave(self, number: int) -> NoReturn:
        if not self._is_said:
            self._say(number)
        os._exit(128 + (self.number or number))

    def _not_raised(self, lost: Any) -> None:
        """Where Python cannot raise (destructors, weakref's callbacks) the signal comes again a moment later."""
        if isinstance(lost.exc_value, Stopped) or lost.exc_type is Stopped:
            self._is_lost = True
            _thread.start_new_thread(self._again, ())
        else:
            self._unraisable(lost)

    def _again(self) -> None:
        time.sleep(0.01)  # out of that place, which runs in the main thread
        signal.pthread_kill(self._main, self.number)

    def _watch(self, reading: int) -> None:
        """Runs beside: end the process if it does not end by itself. Python wakes it while native code runs, too."""
        number = 0
        while number not in _TAKEN:
            number = os.read(reading, 1)[0]
        for _ in range(10):
            time.sleep(AGAIN / 10)
            if not self.number:  # just missed by a call that waits, which another one interrupts
                signal.pthread_kill(self._main, number)
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(reading, 4096):
                pass
        select.select([reading], [], [], PATIENCE - AGAIN)
        self._leave(number)

    # A child that some library forks is not the command: it has no watch, and its parent ends it. Were it to take a
    # signal before that is settled, it would tell the parent's watch.

    def _hold(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)

    def _free(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _let_go(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in _TAKEN:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, signal.SIG_DFL)
        self._free()


def _close_scratch() -> None:
    scratch = sys.modules.get("fossil_export.writing._scratch")
    if scratch is not None and hasattr(scratch, "close_all"):  # half imported when the signal came
        scratch.close_all()
