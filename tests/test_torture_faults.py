"""System calls that fail: nothing is lost in silence, and the line names the file and a remedy."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.errors import OutputError, failed
from fossil_export.writing import _staging as staging
from fossil_export.writing._single_file import staged_file
from fossil_export.writing._staging import staged_folder

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")


@FULL
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output_is_one_line(arguments: list[str], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fossil_export", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output: No space left on device; ")
    assert done.stderr.count("\n") == 1


def test_half_a_write_to_unbuffered_output_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from fossil_export import cli

    class Slow(io.RawIOBase):
        taken = b""

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.taken += bytes(data)[:3]  # type: ignore[call-overload]
            return min(3, len(bytes(data)))  # type: ignore[call-overload]

    raw = Slow()
    before = io.TextIOWrapper(raw, "utf-8", write_through=True)  # type: ignore[type-var]
    monkeypatch.setattr(sys, "stdout", before)
    cli._buffer_output()
    sys.stdout.write("a whole line")
    sys.stdout.flush()
    assert raw.taken == b"a whole line"


@FULL
def test_what_a_gguf_cannot_take_is_told() -> None:
    from fossil_export.converting._gguf_lora import _Checked

    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as full:
        np.ones(16, np.float32).view(_Checked).tofile(full)


@FULL
def test_what_a_graphs_data_cannot_take_is_told() -> None:
    import onnx_ir as ir

    from fossil_export.onnx.graph._edit import _told

    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as full:
        _told(ir.Tensor(np.ones(512, np.float32))).tofile(full)


def test_unread_companion_is_blamed_and_not_the_output(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        LocalFolder(tmp_path).read("folder")
    assert caught.value.filename == str(tmp_path / "folder")
    problem = OSError(errno.EIO, "Input/output error", "/base/LICENSE")
    assert failed("/out", problem, Path("/.out.partial-1")).startswith("/base/LICENSE: cannot be used: Input/output")
    inside = OSError(errno.ENOSPC, "No space left on device", "/.out.partial-1/x")
    assert failed("/out", inside, Path("/.out.partial-1")).startswith("/out: writing failed: No space left")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="nothing here opens and cannot be read")
def test_unread_base_is_blamed_and_not_the_output() -> None:
    from fossil_export.merging._digest import _looked_at

    with pytest.raises(OSError, match="Input/output error") as caught:
        _looked_at(Path("/proc/self/mem"))
    assert caught.value.filename == "/proc/self/mem"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_folder_that_cannot_be_synced(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems sync no folders, which is no failure; one that fails is told, and the result stays."""
    whole = staging.sync

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(code, os.strerror(code))
        whole(path)

    monkeypatch.setattr(staging, "sync", sync)
    try:
        with staged_folder(tmp_path / "out", 0, overwrite=False) as folder:
            (folder / "x").write_text("x")
    except OutputError as problem:
        assert code == errno.EIO
        assert "is written, but may be lost if the machine goes down" in str(problem)
    else:
        assert code == errno.EINVAL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_folder_is_given_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / staging.PROVENANCE).write_text("{}")
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Input/output"), staged_folder(old, 0, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / staging.PROVENANCE).is_file()


def test_unfinished_name_that_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with staged_file(tmp_path / "out") as path:
        path.write_text("x")
    assert (tmp_path / "out").read_text() == "x"


def test_watched_calls_fail_as_they_are_told(tmp_path: Path) -> None:
    """What `torture faults` stands on: a call of a forked process fails, with the errno that was asked for."""
    calls = pytest.importorskip("torture.faults.calls", reason="benchmarks/ is not on the path")
    if reason := calls.why_not():
        pytest.skip(reason)

    def work() -> int:
        try:
            (tmp_path / "x").write_bytes(b"x")
        except OSError as problem:
            return problem.errno or 0
        return 0

    def decide(call: object) -> int | None:
        return errno.ENOSPC if getattr(call, "path", "") == str(tmp_path / "x") else None

    names = frozenset({"write"})
    assert calls.watched(work, names, decide, 5.0) == calls.Ended(errno.ENOSPC, False)
    assert calls.watched(work, names, lambda call: None, 5.0) == calls.Ended(0, False)


@pytest.mark.skipif(sys.platform != "linux", reason="the harness looks at calls as Linux makes them")
def test_commands_end_as_promised_where_calls_fail_and_files_are_out_of_reach() -> None:
    """A few of what `make torture` tries."""
    from torture import faults
    from torture.kinds import Options
    from torture.rows import Row

    if reason := faults.why_not():
        pytest.skip(reason)
    rows: list[Row] = []
    only = r"^(merge over: (ENOSPC|un)|convert gguf over: (pipe|link)|onnx swappable: (pipe|empty)|verify: (un|broken))"
    faults.run(Options(15, 0, 60.0, only, 1, frozenset()), rows.append)
    assert len({row.case.split(":")[0] for row in rows}) == 4
    assert [row for row in rows if not faults.OUTCOMES[row.outcome] and row.outcome != "slow"] == []
