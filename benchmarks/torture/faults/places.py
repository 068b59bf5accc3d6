"""Inputs and outputs that are no files to be had: without permissions, or something else in their place."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torture.faults.attempts import (
    SECONDS,
    Bench,
    Sound,
    differences,
    leftovers,
    printed_in,
    remove,
    rerun,
    run_command,
    tree_of,
)
from torture.faults.calls import Ended, watched
from torture.faults.scenes import COMMANDS, Command
from torture.fuzz.running import ENDINGS
from torture.rows import Row

_COPIED = (".safetensors", ".index.json", ".onnx", ".data", ".gguf", "adapter_config.json")
"""Endings of what may not differ in a result: no command copies these as they are, whatever they hold."""


@dataclass(frozen=True)
class Sort:
    """What is done to a file (or folder) of an input: its permissions are `mode`, or `put` makes something else in its
    place."""

    name: str
    files: bool
    folders: bool
    mode: int | None = None
    put: Callable[[Path], object] | None = None


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{here}/{path.name}")  # a name may have no more than 107 bytes
    finally:
        os.close(here)


ALSO = (
    *COMMANDS,
    Command("push", ("push", "{here}/merged", "somebody/model", "--dry-run", "--json"), (("merged", "merged"),)),
)
"""The commands that are tried with these: of `push` there is no other part without a Hub."""

SORTS = (
    Sort("unreadable file", True, False, mode=0o200),
    Sort("unwritable file", True, False, mode=0o400),
    Sort("unreadable folder", False, True, mode=0o300),
    Sort("unwritable folder", False, True, mode=0o500),
    Sort("unsearchable folder", False, True, mode=0o600),
    Sort("pipe", True, True, put=os.mkfifo),
    Sort("socket", True, True, put=_socket),
    Sort("link to /dev/zero", True, True, put=lambda path: path.symlink_to("/dev/zero")),
    Sort("link to /dev/full", True, False, put=lambda path: path.symlink_to("/dev/full")),
    Sort("folder for a file", True, False, put=lambda path: path.mkdir()),
    Sort("broken link", True, True, put=lambda path: path.symlink_to(path.parent / "nowhere")),
    Sort("link in a circle", True, True, put=lambda path: path.symlink_to(path.name)),
    Sort("empty file", True, True, put=lambda path: path.touch()),
    Sort("nothing", True, True, put=lambda path: None),
)


def places_of(command: Command, bench: Bench) -> list[Path]:
    """Every file and folder that the command is given, and the folder that it writes to."""
    found: set[Path] = set()
    command.prepare(bench.sound, bench.here)
    for word in command.arguments(bench.sound, bench.here):
        path = Path(word)
        if not path.is_absolute() or not path.exists():
            continue
        if path.is_file():  # what lies beside it is its own
            path = path.parent if path.parent != bench.here else path
        found |= {path, *path.rglob("*")}
    return [bench.here, *sorted(found)] if command.writes else sorted(found)


def _spoiled(sort: Sort, path: Path, aside: Path) -> Callable[[], None]:
    """Do it to `path`; what gives `path` back."""
    if sort.mode is not None:
        before = stat.S_IMODE(path.stat().st_mode)
        path.chmod(sort.mode)
        return lambda: path.chmod(before)
    path.rename(aside)
    assert sort.put is not None
    sort.put(path)

    def mend() -> None:
        remove(path)
        aside.rename(path)

    return mend


@contextmanager
def spoiled(sort: Sort, path: Path, aside: Path) -> Iterator[None]:
    mend = _spoiled(sort, path, aside)
    try:
        yield
    finally:
        mend()


def as_a_user() -> None:
    """Take from this process (and what it starts) what lets root pass over permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    override, search = 1, 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.prctl(24, override, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(24, search, 0, 0, 0)
    number = {"x86_64": (125, 126), "aarch64": (90, 91)}[platform.machine()]
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.syscall(number[0], head, sets)
    for place in (0, 1, 2):
        sets[place] &= ~(1 << override | 1 << search)
    libc.syscall(number[1], head, sets)


def fits(sort: Sort, path: Path, bench: Bench) -> bool:
    if path == bench.here:  # the words that are printed go there too
        return sort.name == "unwritable folder"
    return sort.folders if path.is_dir() else sort.files


def attempt(command: Command, sort: Sort, number: int, path: Path, sound: Sound, bench: Bench) -> Row:
    """Run the command with this done to `path`."""
    command.prepare(bench.sound, bench.here)
    aside = bench.here.with_name("aside")
    touched = str(path.relative_to(bench.here)) if path.is_relative_to(bench.here) else None
    with spoiled(sort, path, aside):
        before = tree_of(bench.here)
        ended = run(command, bench)
        outcome, detail = verdict(ended, path, before, sound, bench, touched)
    if outcome in ("right", "refused") and (left := leftovers(bench.here)):
        again = rerun(command, sound, bench)
        if again:
            outcome, detail = "left", f"{left}, and the next run: {again} | {detail}"
    name = str(path).replace(str(bench.here), "…").replace(str(bench.sound), "…")
    return Row("faults", f"{command.name}: {sort.name}", "", number, outcome, f"{name} | {detail}"[:2000])


def run(command: Command, bench: Bench) -> Ended:
    arguments = command.arguments(bench.sound, bench.here)

    def work() -> int:
        (bench.here / "stdout").touch()
        (bench.here / "stderr").touch()
        return run_command(arguments, bench.here, as_a_user)

    for name in ("stdout", "stderr"):
        (bench.here / name).touch()
    return watched(work, frozenset({"rmdir"}), lambda call: None, SECONDS)


def verdict(
    ended: Ended, path: Path, before: dict[str, str], sound: Sound, bench: Bench, touched: str | None
) -> tuple[str, str]:
    words = (bench.here / "stderr").read_text(errors="replace")
    if ended.slow:
        return "slow", words[-600:]
    if "Traceback (most recent call last)" in words:
        return "traceback", words[-1500:]
    if ended.status < 0 or ended.status > 1:
        return "ended", f"{ended.status} {words[-800:]}"
    said = [line for line in words.splitlines() if not line.startswith(("warning: ", "note: "))]
    tree, printed = tree_of(bench.here), printed_in(bench.here)
    if ended.status == 0:
        if said:
            return "chatter", words[-600:]
        other = {name for name in tree.keys() | sound.tree.keys() if tree.get(name) != sound.tree.get(name)}
        return ("lost", differences(tree, sound.tree)) if any(_copied(n, touched) for n in other) else ("right", words)
    if printed and not said:  # the verdict of `verify` or `inspect`
        said = [f"error: {printed}; told as JSON"]
    if len(said) != 1 or not said[0].startswith(ENDINGS):
        return ("chatter" if said else "silent"), words[-800:]
    names = {str(path.parent), path.name}
    if not any(name in said[0] for name in names):
        return "vague", f"another path: {said[0]}"
    if said[0].startswith("error: ") and ";" not in said[0]:
        return "vague", f"no remedy: {said[0]}"
    if said[0].startswith("not the trained model: "):  # a verdict too is written down
        tree = {name: value for name, value in tree.items() if not name.endswith(("fossil_parity.json", "report.html"))}
    # The certificate and the report of `verify` are two files, each whole.
    parts = all(value in (before.get(name), sound.tree.get(name)) for name, value in tree.items())
    if tree != before and not ("report.html" in sound.tree and parts and before.keys() <= tree.keys()):
        return "half", f"{differences(tree, before)} {said[0]}"
    return "refused", said[0]


def _copied(name: str, touched: str | None) -> bool:
    """Whether this file of a result may not differ from the sound one's."""
    return name != touched and name.endswith(_COPIED)


def all_places(only: Callable[[str], object], bench: Bench) -> list[tuple[Command, Sort, int, Path]]:
    found = []
    for command in ALSO:
        places = places_of(command, bench)
        for sort in SORTS:
            if only(f"{command.name}: {sort.name}"):
                fitting = [path for path in places if fits(sort, path, bench)]
                found += [(command, sort, number, path) for number, path in enumerate(fitting)]
    return found
