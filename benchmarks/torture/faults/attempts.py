"""One system call of a command fails: what is said of it, and what is there afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.faults.calls import Call, Decide, Ended, watched
from torture.faults.scenes import Command
from torture.rows import Row

SECONDS = 10.0
STDOUT = "/stdout"
_VARY = ("seconds", "peak_memory", "warnings")  # a copy in the place of a link is told
_LIBRARIES = ("ONNX Runtime could not write", "does not pass ONNX's checker")  # which hide what the system said

_MAKING = frozenset({"mkdir", "mkdirat", "link", "linkat", "symlink"})
_NAMING = frozenset({"rename", "renameat", "renameat2"})
_REMOVING = frozenset({"unlink", "unlinkat", "rmdir"})
_FILLING = frozenset(
    {"write", "writev", "pwrite64", "pwritev", "sendfile", "copy_file_range", "fallocate", "ftruncate"}
)
_SYNCING = frozenset({"fsync", "fdatasync"})
_OPENING = frozenset({"open", "openat"})
_READING = frozenset({"read", "pread64", "preadv", "getdents64"})
_TAKING = _MAKING | _NAMING | _FILLING | _SYNCING


@dataclass(frozen=True)
class Fault:
    """How a call fails: with `code` (0: half of it is done), once or `sticky` from then on. It is one of `names`, or an
    open or close of a file for writing where these are `opens` or `closes`."""

    name: str
    code: int
    names: frozenset[str]
    opens: bool = True
    closes: bool = False
    sticky: bool = False
    reads: bool = False

    @property
    def watched(self) -> frozenset[str]:
        return self.names | (_OPENING if self.opens else frozenset()) | ({"close"} if self.closes else frozenset())

    def hits(self, call: Call) -> bool:
        if call.name in _OPENING:
            return self.opens and (call.writes or self.reads)
        if call.name == "close":
            return self.closes and call.writes
        return call.name in self.names


FAULTS = (
    Fault("ENOSPC", errno.ENOSPC, _TAKING),
    Fault("ENOSPC for good", errno.ENOSPC, _TAKING, sticky=True),
    Fault("EDQUOT", errno.EDQUOT, _TAKING, closes=True),
    Fault("EIO", errno.EIO, _TAKING | _REMOVING, closes=True),
    Fault("EINTR", errno.EINTR, _TAKING | _REMOVING, closes=True),
    Fault("EROFS for good", errno.EROFS, _MAKING | _NAMING | _REMOVING, sticky=True),
    Fault("EACCES", errno.EACCES, _MAKING | _NAMING | _REMOVING),
    Fault("half a write", 0, frozenset({"write", "pwrite64"}), opens=False),
    Fault("EIO reading", errno.EIO, _READING, reads=True),
    Fault("EMFILE", errno.EMFILE, frozenset(), reads=True),
)


@dataclass(frozen=True)
class Bench:
    """Where attempts are made: `sound` has the inputs, `here` is made anew for each."""

    sound: Path
    here: Path

    def within(self, path: str) -> bool:
        return f"{path}/".startswith((f"{self.here}/", f"{self.sound}/"))

    def has(self, call: Call) -> bool:
        """Whether a call is one that may fail: on the inputs, the output, or standard output once it is open."""
        printed = call.path in (f"{self.here}{STDOUT}", f"{self.here}/stderr")
        return self.within(call.path) and not (printed and (call.name in _OPENING or call.path.endswith("/stderr")))


@dataclass(frozen=True)
class Sound:
    """What a command makes of sound inputs on a sound disk, and the places where calls can fail."""

    tree: dict[str, str]
    printed: str
    calls: tuple[Call, ...]


def sound_run(command: Command, bench: Bench) -> Sound:
    calls: list[Call] = []

    def look(call: Call) -> None:
        if bench.has(call):
            calls.append(call)

    command.prepare(bench.sound, bench.here)
    names = frozenset().union(*(fault.watched for fault in FAULTS))
    ended = attempt_run(command, bench, names, look)
    assert ended == Ended(0, False), (command.name, ended, (bench.here / "stderr").read_text())
    return Sound(tree_of(bench.here), printed_in(bench.here), tuple(calls))


def attempt(command: Command, fault: Fault, number: int, sound: Sound, bench: Bench) -> Row:
    """The call that is the `number`th of those that `fault` can hit fails."""
    fired: list[Call] = []
    seen = 0

    def decide(call: Call) -> int | None:
        nonlocal seen
        if not (bench.has(call) and fault.hits(call)):
            return None
        seen += 1
        if seen == number + 1 or (fault.sticky and seen > number):
            fired.append(call)
            return fault.code
        return None

    command.prepare(bench.sound, bench.here)
    before = tree_of(bench.here)
    ended = attempt_run(command, bench, fault.watched, decide)
    outcome, detail = verdict(ended, fault, fired, before, sound, bench)
    if outcome in ("right", "refused") and (left := leftovers(bench.here)):
        again = rerun(command, sound, bench)
        if again:
            outcome, detail = "left", f"{left}, and the next run: {again} | {detail}"
    where = f"{fired[0].name} {fired[0].path.replace(str(bench.here), '…')}" if fired else ""
    return Row("faults", f"{command.name}: {fault.name}", "", number, outcome, f"{where} | {detail}"[:2000])


def verdict(
    ended: Ended, fault: Fault, fired: list[Call], before: dict[str, str], sound: Sound, bench: Bench
) -> tuple[str, str]:
    words = (bench.here / "stderr").read_text(errors="replace")
    if ended.slow:
        return "slow", words[-600:]
    if ended.status < 0 or ended.status > 1:
        return "ended", f"{ended.status} {words[-800:]}"
    if "Traceback (most recent call last)" in words:
        return "traceback", words[-1500:]
    if not fired:
        return "unfired", ""
    said = [line for line in words.splitlines() if not line.startswith(("warning: ", "note: "))]
    tree, printed = tree_of(bench.here), printed_in(bench.here)
    whole = tree == sound.tree
    if ended.status == 0:
        lacks = sound.tree.keys() - tree.keys()
        # A certificate that cannot be written is no fault of the artifact, which has its verdict.
        certificate = "fossil_parity.json"
        told = certificate in words and os.strerror(fault.code) in words
        if told and {Path(name).name for name in lacks} <= {certificate}:
            return "warned", words
        if not whole or printed != sound.printed:
            return "lost", f"{differences(tree, sound.tree)} {words[-400:]}"
        if fault.code not in (0, errno.EINTR) and any(call.name in _SYNCING for call in fired):
            return "unsynced", ""
        return ("chatter", words[-600:]) if said else ("right", "")
    if not said and os.strerror(fault.code) in printed:  # the verdict of `inspect`
        return "refused", printed[-200:]
    if len(said) != 1 or not said[0].startswith("error: "):
        return ("chatter" if said else "silent"), words[-800:]
    if fault.code and os.strerror(fault.code) not in said[0] and not any(one in said[0] for one in _LIBRARIES):
        return "vague", f"no {os.strerror(fault.code)!r}: {said[0]}"
    if not any(name in said[0].split(";")[0] for name in _to_blame(fired[0], bench)):
        return "vague", f"another path: {said[0]}"
    if ";" not in said[0]:
        return "vague", f"no remedy: {said[0]}"
    # What went wrong after the name was taken is told, and does not take it back.
    late = fired[0].path.endswith(STDOUT) or fired[0].path == str(bench.here)
    # The certificate and the report of `verify` are two files, each whole.
    parts = all(value in (before.get(name), sound.tree.get(name)) for name, value in tree.items())
    if (
        tree != before
        and not (late and whole)
        and not ("report.html" in sound.tree and parts and before.keys() <= tree.keys())
    ):
        return "half", f"{differences(tree, before)} {said[0]}"
    return "refused", said[0]


def _to_blame(call: Call, bench: Bench) -> list[str]:
    """What the line must name: the file or folder that was read, the output, or standard output."""
    if call.path == f"{bench.here}{STDOUT}":
        return ["standard output"]
    if f"{call.path}/".startswith(f"{bench.sound}/") and call.name not in _FILLING | _MAKING:
        return [call.path, str(Path(call.path).resolve())]
    return [str(bench.here)]


def rerun(command: Command, sound: Sound, bench: Bench) -> str:
    """Run the command again, beside what is left; what is wrong with what is there then."""
    for path in bench.here.iterdir():
        if not path.name.startswith(".") and path.name != "tmp":
            remove(path)
    for _, name in command.prepared:
        remove(bench.here / name)
    command.copy(bench.sound, bench.here)
    ended = attempt_run(command, bench, frozenset({"rmdir"}), lambda call: None)
    if ended.status != 0:
        return f"{ended.status} {(bench.here / 'stderr').read_text()[-500:]}"
    if tree_of(bench.here) != sound.tree:
        return differences(tree_of(bench.here), sound.tree)
    return f"leaves {left}" if (left := leftovers(bench.here)) else ""


def attempt_run(command: Command, bench: Bench, names: frozenset[str], decide: Decide) -> Ended:
    arguments = command.arguments(bench.sound, bench.here)
    return watched(lambda: run_command(arguments, bench.here), names, decide, SECONDS)


def run_command(arguments: list[str], here: Path, also: Callable[[], None] = lambda: None) -> int:
    """What the command does as a process of its own, down to the last flush."""
    from fossil_export.cli import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(here / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number, inheritable=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(here / "tmp"), None
    also()
    code = 0
    try:
        main(arguments, prog_name="fossil-export")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    try:
        sys.stdout.flush()
    except OSError as problem:
        print(f"Exception ignored in: stdout: {problem}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    return code


def tree_of(here: Path) -> dict[str, str]:
    """What lies under names that show, without what two runs differ in."""
    found = {}
    for root, folders, files in os.walk(here):
        if Path(root) == here:
            folders[:] = [name for name in folders if name != "tmp" and not name.startswith(".")]
            files = [name for name in files if name not in ("stdout", "stderr") and not name.startswith(".")]
        for name in files:
            path = Path(root) / name
            if ".partial-" in name and name.startswith("."):
                continue
            if not stat.S_ISREG(path.lstat().st_mode):  # put there; not to be waited for
                found[str(path.relative_to(here))] = "no file"
                continue
            content = path.read_bytes()
            if path.suffix == ".json":
                content = re.sub(rb'"(seconds|peak_memory)": [\d.]+', b"", content)
            elif path.suffix == ".html":
                content = re.sub(rb"\d", b"", content)
            found[str(path.relative_to(here))] = hashlib.sha256(content).hexdigest()
    return found


def printed_in(here: Path) -> str:
    text = (here / "stdout").read_text()
    try:
        return json.dumps(_steady(json.loads(text)))
    except ValueError:
        return text


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(entry) for key, entry in value.items() if key not in _VARY}
    return [_steady(entry) for entry in value] if isinstance(value, list) else value


def leftovers(here: Path) -> list[str]:
    hidden = [path.name for path in (*here.iterdir(), *here.rglob(".*.partial-*")) if path.name.startswith(".")]
    return sorted(hidden) + sorted(f"tmp/{path.name}" for path in (here / "tmp").iterdir())


def differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    lack = sorted(wanted.keys() - found.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"lacks {lack[:5]}, has besides {sorted(found.keys() - wanted.keys())[:5]}, others {other[:5]}"


def remove(path: Path) -> None:
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
