"""Single files: whole or not there, whoever else writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_adapter, make_base

from fossil_export import convert
from fossil_export.errors import OutputError
from fossil_export.writing._single_file import staged_file, write_file


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(ZeroDivisionError), staged_file(target) as path:
        path.write_bytes(b"half")
        assert not target.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    write_file(target, b"whole")
    write_file(target, b"another")
    assert target.read_bytes() == b"another" and list(tmp_path.iterdir()) == [target]


def test_without_overwrite_the_first_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(FileExistsError), staged_file(target, overwrite=False) as path:
        path.write_bytes(b"second")
        target.write_bytes(b"first")
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Under every name that was ever used for the unfinished file, and under the file's own."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".file.partial", f".file.partial-{os.getpid()}", "file"):
        (tmp_path / name).symlink_to(victim)
    write_file(tmp_path / "file", b"content")
    assert victim.read_text() == "precious" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from fossil_export.writing._single_file import staged_file
with staged_file(Path(sys.argv[1])) as path:
    path.write_bytes(b"half")
    print(path, flush=True)
    time.sleep(60)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    partial = []
    for child in children:
        assert child.stdout is not None
        partial.append(Path(child.stdout.readline().strip()))
    children[0].kill()
    children[0].wait()
    write_file(tmp_path / "file", b"whole")
    assert not partial[0].exists() and partial[1].read_bytes() == b"half"
    children[1].send_signal(signal.SIGTERM)
    children[1].wait()


WRITER = """
import sys
from pathlib import Path
from fossil_export.writing._single_file import write_file
letter = sys.argv[2].encode()
for _ in range(60):
    write_file(Path(sys.argv[1]), letter * 300_000)
"""


def test_many_processes_write_one_file(tmp_path: Path) -> None:
    """At any time it is the whole file of one of them."""
    target = tmp_path / "file"
    write_file(target, b"a" * 300_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), letter]) for letter in "abcdef"]
    looked = 0
    while any(writer.poll() is None for writer in writers):
        content = target.read_bytes()
        assert len(content) == 300_000 and content.count(content[:1]) == 300_000
        looked += 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0] * 6 and looked > 10
    assert list(tmp_path.iterdir()) == [target]


CONVERT = """
import sys
from fossil_export import convert
from fossil_export.errors import OutputError
try:
    convert(sys.argv[1], sys.argv[2], to="gguf-lora", overwrite=sys.argv[3] == "True")
except OutputError as problem:
    sys.exit(str(problem))
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_conversions_to_one_gguf_do_not_mix(overwrite: bool, tmp_path: Path) -> None:
    """The file is one of the two, byte for byte; without --overwrite the later one says that it is too late."""
    base = make_base(tmp_path / "base")
    alone = []
    for name, rank in (("one", 4), ("two", 8)):
        make_adapter(tmp_path / name, base, r=rank)
        convert(tmp_path / name, tmp_path / f"{name}.gguf", to="gguf-lora")
        alone.append((tmp_path / f"{name}.gguf").read_bytes())
    target = tmp_path / "both.gguf"
    if overwrite:
        target.write_bytes(alone[0])
    for _ in range(3):
        if not overwrite:
            target.unlink(missing_ok=True)
        command = [sys.executable, "-c", CONVERT]
        both = [
            subprocess.Popen([*command, str(tmp_path / name), str(target), str(overwrite)], stderr=subprocess.PIPE)
            for name in ("one", "two")
        ]
        said = [child.communicate()[1].decode() for child in both]
        assert target.read_bytes() in alone
        assert not list(tmp_path.glob(".both*"))
        for child, words in zip(both, said, strict=True):
            late = not overwrite and child.returncode == 1
            assert child.returncode == 0 or late, words
            assert "meanwhile" in words or "exists already" in words or not late
        assert any(child.returncode == 0 for child in both)


def test_a_planted_link_is_not_what_a_conversion_writes_to(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lora.gguf.partial").symlink_to(victim)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", to="gguf-lora")
    assert victim.read_text() == "precious"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"lora\.gguf: writing failed: No space left on device; make room"):
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", to="gguf-lora")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".lora*"))
