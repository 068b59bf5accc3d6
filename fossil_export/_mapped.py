"""A file that is cut while a library has it mapped ends the process with SIGBUS; here it does so with one line.

transformers, ONNX Runtime and onnx_ir map the files of weights that they are given. What this package itself reads for
a result it reads without a map (`checkpoints/_input.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

_FAILED = 1
_CODE, _ADDRESS = 8, 16
"""Bytes in siginfo_t before the reason and the address of the fault, on 64-bit Linux (asm-generic/siginfo.h)."""
_NOTHING_THERE = 2
"""BUS_ADRERR; others are of memory that is broken, an address that is odd, or `kill -BUS`."""

_AT_MOST = 5.0
"""Seconds that one thread takes to tell."""

_kept: list[Any] = []
_told: list[int] = []


def tell_of_cut_files() -> None:
    """Have a read past the end of a mapped file end this process with the line of an error and its exit code.

    For commands; nothing but that line is lost if it cannot be set up. Python's own handlers do not serve: they run
    once the instruction that failed is done, which it never is.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32 or _kept:
        return
    import ctypes

    class Action(ctypes.Structure):
        # struct sigaction of glibc and musl.
        _fields_ = (
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_byte * 128),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    def cut(number: int, info: int, context: int) -> None:
        if ctypes.c_int.from_address(info + _CODE).value != _NOTHING_THERE:
            system.sigaction(number, ctypes.byref(Action()), None)  # the default, for what this is not
            os.kill(os.getpid(), number)
            return
        if _told:  # by another thread, which is ending the process
            time.sleep(_AT_MOST)
            os._exit(_FAILED)
        _told.append(number)
        try:
            address = ctypes.c_uint64.from_address(info + _ADDRESS).value
            os.write(2, f"error: {_file_at(address)}: {_PROBLEM}\n".encode())
        finally:
            os._exit(_FAILED)

    siginfo = 4
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(cut)
    action = Action(handler=ctypes.cast(handler, ctypes.c_void_p), flags=siginfo)
    try:
        system = ctypes.CDLL(None)
        failed = system.sigaction(int(signal.SIGBUS), ctypes.byref(action), None)
    except (OSError, AttributeError):
        return
    if not failed:
        _kept.append(handler)


_PROBLEM = "was cut while it was being read; wait until whatever writes it is done, then run the command again"


def _file_at(address: int) -> str:
    """What is mapped at an address of this process."""
    from fossil_export._console import printable

    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            span, *rest = line.split(None, 5)
            first, last = (int(end, 16) for end in span.split(b"-"))
            if first <= address < last and len(rest) == 5:
                return printable(rest[4].strip().decode(errors="replace"))
    return "a file of weights"
