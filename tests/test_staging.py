"""All or nothing: what is there after a crash, a kill, a full disk, a refusal by the filesystem."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import progress_tools
import pytest
from conftest import interruptible, make_adapter, weights
from progress_tools import in_the_middle

from fossil_export import FossilExportError, merge
from fossil_export.writing import _output as output_module
from fossil_export.writing import _staging as staging
from fossil_export.writing._output import OutputFile

# A merge that stops in the middle until it is killed. Its threads report at once, so a line has to be one write.
every_slab = progress_tools.every_slab
STUCK = """
import os, sys, time
from fossil_export import _progress, merge
_progress.EVERY = 0.0
def stick(now):
    if now.done and now.unit == "B":
        os.write(1, b"writing\\n")
        time.sleep(600)
merge(sys.argv[1], sys.argv[2], progress=stick)
"""


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in {"base", "adapter"})


def start_stuck(adapter: Path, target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(adapter), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_killed_run_leaves_nothing_under_the_name_and_the_next_cleans_up(adapter: Path, tmp_path: Path) -> None:
    process = start_stuck(adapter, tmp_path / "merged")
    process.kill()
    process.communicate()
    (leftover,) = left(tmp_path)
    assert leftover.startswith(".merged.partial-")
    assert (
        not (tmp_path / leftover / "config.json").exists() and not (tmp_path / leftover / "fossil_export.json").exists()
    )
    merge(adapter, tmp_path / "merged")
    assert left(tmp_path) == ["merged"]


def test_live_run_is_left_alone(adapter: Path, tmp_path: Path) -> None:
    process = start_stuck(adapter, tmp_path / "merged")
    try:
        (running,) = left(tmp_path)
        merge(adapter, tmp_path / "merged")
        assert left(tmp_path) == [running, "merged"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_command_cleans_up_itself(number: int, real_adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fossil_export", "merge", str(real_adapter), "--output", str(tmp_path / "merged")]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".merged.partial-*/*")):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + number, "Aborted!\n" if number == signal.SIGINT else "")
    assert left(tmp_path) == []


@pytest.mark.usefixtures("every_slab")
def test_failure_in_the_middle_removes_all(adapter: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        merge(adapter, tmp_path / "new" / "deep" / "merged", progress=in_the_middle(fail))
    assert left(tmp_path) == []


def test_disk_space_is_checked_first(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(FossilExportError, match=r"needs [\d,]+ bytes, .* has 100,000 free"):
        merge(adapter, tmp_path / "merged")
    assert left(tmp_path) == []


def test_disk_that_fills_up_while_writing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output_module.os, "posix_fallocate", full)
    with pytest.raises(FossilExportError, match=r"No space left on device.*make room"):
        merge(adapter, tmp_path / "merged")
    assert left(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "setresuid") or os.getuid() != 0, reason="only root can become someone else")
def test_no_permission() -> None:
    """As another user, since root may write anywhere."""
    script = (
        "import os, sys, pathlib; from fossil_export.writing._staging import staged_folder\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "with staged_folder(pathlib.Path(sys.argv[1]), 0, False): pass"
    )
    with tempfile.TemporaryDirectory() as locked:
        Path(locked).chmod(0o755)
        done = subprocess.run([sys.executable, "-c", script, f"{locked}/merged"], capture_output=True, text=True)
        assert "OutputError" in done.stderr and "Permission denied" in done.stderr, done.stderr
        assert list(Path(locked).iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_folder_whole(
    exchange: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    old = weights(tmp_path / "merged")
    (tmp_path / "merged" / "stale.txt").write_text("of the first merge")
    make_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    merge(tmp_path / "adapter", tmp_path / "merged", overwrite=True)
    assert left(tmp_path) == ["merged"]
    assert not (tmp_path / "merged" / "stale.txt").exists()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert bool((weights(tmp_path / "merged")[name] != old[name]).any())


@pytest.mark.usefixtures("every_slab")
def test_folder_that_appears_meanwhile_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    def someone_else() -> None:
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged" / "thesis.tex").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(FossilExportError, match="cannot be put in place"):
            merge(adapter, tmp_path / "merged", progress=in_the_middle(someone_else), overwrite=overwrite)
        assert (tmp_path / "merged" / "thesis.tex").read_text() == "years of work"
        assert left(tmp_path) == ["merged"]
        shutil.rmtree(tmp_path / "merged")


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_result_that_appears_meanwhile_is_replaced_only_if_that_was_asked_for(
    overwrite: bool, tmp_path: Path
) -> None:
    def write() -> None:
        with staging.staged_folder(tmp_path / "out", 0, overwrite) as folder:
            (folder / "new").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / staging.PROVENANCE).touch()

    if overwrite:
        write()
    else:
        with pytest.raises(FossilExportError, match="cannot be put in place"):
            write()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new" if overwrite else staging.PROVENANCE]
    assert left(tmp_path) == ["out"]


def test_folder_set_aside_by_a_killed_overwrite_comes_back(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    (tmp_path / "merged").rename(tmp_path / ".merged.replaced-00000000")
    with pytest.raises(FossilExportError, match="not finished"), staging.staged_folder(tmp_path / "merged", 0, False):
        raise FossilExportError("not finished")
    assert left(tmp_path) == ["merged"]
    assert json.loads((tmp_path / "merged" / "fossil_export.json").read_text())["artifact"] == "merged"


def test_empty_folder_may_be_the_output(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge(adapter, tmp_path / "merged")
    assert left(tmp_path) == ["merged"] and (tmp_path / "merged" / "config.json").is_file()


def test_permissions_are_those_of_any_new_file(adapter: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        merge(adapter, tmp_path / "merged")
    finally:
        os.umask(before)
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o640}


@pytest.mark.parametrize("refusal", ["open", "write", "allocate"])
def test_filesystems_without_direct_writes(
    refusal: str, real_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tmpfs refuses the flag, some network filesystems only the write; the bytes are the same."""
    merge(real_adapter, tmp_path / "direct")
    if refusal == "open":
        monkeypatch.setattr(output_module, "_open_direct", lambda path: None)
    elif refusal == "allocate":

        def unsupported(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(output_module.os, "posix_fallocate", unsupported)
    else:
        write = os.pwrite
        direct: set[int] = set()
        opened = output_module._open_direct

        def open_direct(path: Path) -> int | None:
            descriptor = opened(path)
            if descriptor is not None:
                direct.add(descriptor)
            return descriptor

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            if descriptor in direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return write(descriptor, data, offset)

        monkeypatch.setattr(output_module, "_open_direct", open_direct)
        monkeypatch.setattr(output_module.os, "pwrite", pwrite)
    merge(real_adapter, tmp_path / "buffered")
    for path in (tmp_path / "direct").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "buffered" / path.name).read_bytes()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_tmpfs(adapter: Path, tmp_path: Path) -> None:
    target = Path("/dev/shm") / f"fossil-export-{os.getpid()}"
    try:
        merge(adapter, target)
        merge(adapter, tmp_path / "merged")
        for path in target.glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of descriptors here")
@pytest.mark.parametrize("direct", [True, False])
def test_an_output_file_leaves_no_descriptor_open(direct: bool, tmp_path: Path) -> None:
    before = _descriptors()
    file = OutputFile(tmp_path / "file", 3, direct)
    assert len(_descriptors()) > len(before)
    file.write(0, np.zeros(3, np.uint8))
    file.close(done=True)
    assert _descriptors() == before


def test_output_file_takes_any_range_at_any_address(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    want = rng.integers(0, 256, 3 * 4096 + 777, np.uint8)
    room = np.empty(len(want) + 9000, np.uint8)
    cuts = [0, 1, 4095, 4096, 4097, 9000, 12288, len(want)]
    for shift, order in product((0, 1, 4096), (1, -1)):
        file = OutputFile(tmp_path / f"at-{shift}-{order}", len(want))
        for start, stop in list(pairwise(cuts))[::order]:
            address = (start - room.ctypes.data + shift) % 4096
            piece = room[address : address + stop - start]
            piece[:] = want[start:stop]
            file.write(start, piece)
        file.close(done=True)
        assert (tmp_path / f"at-{shift}-{order}").read_bytes() == want.tobytes()
