"""System calls of a forked process, looked at one by one, and failed: by seccomp's user notifications, which see those
of all threads, of C libraries too, and need neither a compiler nor root (Linux 5.5 and later, seccomp_unotify(2))."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# By name: the numbers on x86_64 and aarch64 (None: it has none), and how the arguments name the file.
_CALLS: dict[str, tuple[int | None, int | None, str]] = {
    "open": (2, None, "path"),
    "openat": (257, 56, "at"),
    "close": (3, 57, "fd"),
    "read": (0, 63, "fd"),
    "pread64": (17, 67, "fd"),
    "preadv": (295, 69, "fd"),
    "getdents64": (217, 61, "fd"),
    "write": (1, 64, "fd"),
    "writev": (20, 66, "fd"),
    "pwrite64": (18, 68, "fd"),
    "pwritev": (296, 70, "fd"),
    "sendfile": (40, 71, "fd"),
    "copy_file_range": (326, 285, "fd2"),
    "fallocate": (285, 47, "fd"),
    "ftruncate": (77, 46, "fd"),
    "fsync": (74, 82, "fd"),
    "fdatasync": (75, 83, "fd"),
    "mkdir": (83, None, "path"),
    "mkdirat": (258, 34, "at"),
    "rename": (82, None, "path"),
    "renameat": (264, 38, "at"),
    "renameat2": (316, 276, "at"),
    "link": (86, None, "path2"),
    "linkat": (265, 37, "at2"),
    "symlink": (88, None, "path2"),
    "unlink": (87, None, "path"),
    "unlinkat": (263, 35, "at"),
    "rmdir": (84, None, "path"),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_…
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_AT_FDCWD = 0xFFFFFF9C
_PIDFD_GETFD = 438


@dataclass(frozen=True)
class Call:
    """A system call on a file. `writes` tells of an open or a close whether the file is open for writing."""

    name: str
    path: str
    descriptor: int = -1
    writes: bool = False


Decide = Callable[[Call], int | None]
"""The errno that the call fails with; 0 for one that does half of its work; None for one that is let through."""


@dataclass(frozen=True)
class Ended:
    """The exit code (or minus the signal), and whether it was ended for want of time."""

    status: int
    slow: bool


def why_not() -> str | None:
    """Why calls cannot be looked at here."""
    if platform.machine() not in _MACHINES or not hasattr(os, "pidfd_open"):
        return f"no table of system calls of {platform.machine()}"
    try:
        ended = watched(lambda: 0, frozenset({"mkdir", "mkdirat"}), lambda call: None, 5.0)
    except OSError as problem:
        return f"seccomp's user notifications are not to be had: {problem.strerror}"
    return None if ended == Ended(0, False) else f"a process under seccomp ended with {ended.status}"


def watched(work: Callable[[], int], names: frozenset[str], decide: Decide, seconds: float) -> Ended:
    """Run `work` in a fork; each call of `names` there is shown to `decide`. Raises OSError without seccomp."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        _in_child(work, names, theirs)
    theirs.close()
    with ours:
        message, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
    if not descriptors:
        os.waitpid(child, 0)
        code = int(message or b"0")
        raise OSError(code, os.strerror(code))
    try:
        return _serve(child, descriptors[0], decide, time.monotonic() + seconds)
    finally:
        os.close(descriptors[0])


def _in_child(work: Callable[[], int], names: frozenset[str], parent: socket.socket) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        try:
            listener = _filtered(names)
        except OSError as problem:
            parent.send(str(problem.errno).encode())
            os._exit(71)
        socket.send_fds(parent, [b"0"], [listener])
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
    finally:
        os._exit(code)


def _filtered(names: frozenset[str]) -> int:
    """Put this process under a filter that reports the calls of `names`; returns the descriptor to listen on."""
    machine, audit = _MACHINES[platform.machine()]
    numbers = sorted(number for name, number in _numbers(machine).items() if name in names)
    # Of the architecture that we know: is it one of these?
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, 0x7FFF0000), (0x20, 0, 0, 0)]
    code += [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)]  # SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF
    steps = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    seccomp = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    listener = int(libc.syscall(seccomp, 1, 8, program))  # SECCOMP_SET_MODE_FILTER, …_NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


def _numbers(machine: int) -> dict[str, int]:
    pairs = ((name, first if machine == 0 else second) for name, (first, second, _) in _CALLS.items())
    return {name: number for name, number in pairs if number is not None}


def _serve(child: int, listener: int, decide: Decide, end: float) -> Ended:
    machine, _ = _MACHINES[platform.machine()]
    known = {number: name for name, number in _numbers(machine).items()}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end(child)
            return Ended(os.waitstatus_to_exitcode(status), False)
        if time.monotonic() > end:
            _end(child)
            os.waitpid(child, 0)
            return Ended(-signal.SIGKILL, True)
        ready = poll.poll(20)
        if not ready or not ready[0][1] & select.POLLIN:
            if ready:  # nobody is under the filter any more
                time.sleep(0.001)
            continue
        notice = bytearray(80)
        with contextlib.suppress(FileNotFoundError, InterruptedError):  # the thread has gone
            fcntl.ioctl(listener, _RECEIVE, notice)
            number, thread, _, call, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notice)
            answer = _answer(child, thread, known[call], arguments, decide)
            fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", number, *answer))


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _answer(child: int, thread: int, name: str, arguments: list[int], decide: Decide) -> tuple[int, int, int]:
    """Value, minus the errno, flags."""
    found = decide(_call(thread, name, arguments))
    if found:
        return 0, -found, 0
    if found is None or (count := _half(child, thread, name, arguments)) is None:
        return 0, 0, _GO_ON
    return count, 0, 0


def _call(thread: int, name: str, arguments: list[int]) -> Call:
    kind = _CALLS[name][2]
    if kind in ("fd", "fd2"):
        descriptor = arguments[2 if kind == "fd2" else 0] & 0xFFFFFFFF
        path, flags = _link(thread, f"fd/{descriptor}"), 0
        if name == "close":
            with contextlib.suppress(OSError, IndexError):
                text = Path(f"/proc/{thread}/fdinfo/{descriptor}").read_text()
                flags = int(text.split("flags:")[1].split()[0], 8)
        return Call(name, path, descriptor, bool(flags & (os.O_WRONLY | os.O_RDWR)))
    pointer = {"path": 0, "path2": 1, "at": 1, "at2": 3}[kind]
    text = _string(thread, arguments[pointer])
    if not text.startswith("/"):
        folder = arguments[pointer - 1] & 0xFFFFFFFF if kind.startswith("at") else _AT_FDCWD
        text = str(Path(_link(thread, "cwd" if folder == _AT_FDCWD else f"fd/{folder}")) / text)
    flags = arguments[pointer + 1] if name in ("open", "openat") else 0
    return Call(name, text, -1, bool(flags & _WRITING))


def _link(thread: int, name: str) -> str:
    try:
        return str(Path(f"/proc/{thread}/{name}").readlink())
    except OSError:
        return ""


def _string(thread: int, address: int) -> str:
    found = b""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/mem", "rb", 0) as memory:
        memory.seek(address)
        while b"\0" not in found and len(found) < 5000:
            # Never past the page: the next one may not be there.
            found += memory.read(4096 - (address + len(found)) % 4096)
    return os.fsdecode(found.split(b"\0")[0])


def _half(child: int, thread: int, name: str, arguments: list[int]) -> int | None:
    """Do half of a write, in the place of `thread`; returns the bytes, None where it cannot be halved."""
    if name not in ("write", "pwrite64"):
        return None
    descriptor, address, count = arguments[0] & 0xFFFFFFFF, arguments[1], arguments[2]
    count = count // 2 // 4096 * 4096 or count // 2
    try:
        process = os.pidfd_open(child)
    except OSError:
        return None
    ours = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, descriptor, 0)
    os.close(process)
    if ours < 0 or not count:
        return None
    try:
        with mmap.mmap(-1, count) as buffer, open(f"/proc/{thread}/mem", "rb", 0) as memory:
            memory.seek(address)
            buffer[:] = memory.read(count)
            with memoryview(buffer) as view:
                return os.write(ours, view) if name == "write" else os.pwrite(ours, view, arguments[3])
    except OSError as problem:
        if problem.errno == errno.EINVAL:  # O_DIRECT, and no whole pages
            return None
        raise
    finally:
        os.close(ours)
