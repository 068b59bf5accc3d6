"""Folders for temporary files: each process removes its own, and that of a killed one, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fossil_export.writing._scratch import Scratch, close_all, scratch_folder

KEEPS = """
import os, sys, time
from pathlib import Path
from fossil_export.writing._scratch import Scratch
made = Scratch(Path(sys.argv[1])); (made.path / "file").write_bytes(b"x")
os.write(1, (made.path.name + "\\n").encode()); time.sleep(30)
"""


def keeper(place: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", KEEPS, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_next_process_removes_a_killed_ones_folder_and_no_live_ones(tmp_path: Path) -> None:
    (dead, its), (alive, other) = keeper(tmp_path), keeper(tmp_path)
    try:
        dead.kill()
        dead.communicate()
        assert {path.name for path in tmp_path.iterdir()} == {its, other}
        with scratch_folder(tmp_path) as mine:
            assert {path.name for path in tmp_path.iterdir()} == {mine.name, other}
            assert (tmp_path / other / "file").is_file() and mine.stat().st_mode & 0o777 == 0o700
    finally:
        alive.kill()
        alive.communicate()
    with scratch_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_there_under_that_name_is_left_alone(tmp_path: Path) -> None:
    place, treasure = tmp_path / "tmp", tmp_path / "treasure"
    place.mkdir()
    treasure.mkdir()
    (treasure / "file").write_text("years of work")
    (place / "fossil-export-scratch-link").symlink_to(treasure)
    (place / "fossil-export-scratch-file").write_text("a file")
    os.mkfifo(place / "fossil-export-scratch-pipe")  # to open it would wait for a writer
    with scratch_folder(place) as mine:
        assert mine.is_dir()
    assert len(list(place.iterdir())) == 3 and (treasure / "file").read_text() == "years of work"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give folders away")
def test_folders_of_other_users_are_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "fossil-export-scratch-theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with scratch_folder(tmp_path):
        pass
    assert theirs.is_dir()


def test_many_processes_make_folders_in_one_place(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fossil_export.writing._scratch import scratch_folder\n"
        "for _ in range(60):\n"
        "    with scratch_folder(Path(sys.argv[1])) as one:\n"
        "        (one / 'file').write_bytes(b'x'); assert (one / 'file').read_bytes() == b'x'"
    )
    makers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(4)]
    assert [maker.communicate()[1] for maker in makers] == [b""] * 4 and list(tmp_path.iterdir()) == []


def test_a_process_that_ends_without_its_exit_handlers_removes_its_own(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    assert made.path.is_dir()
    close_all()
    assert list(tmp_path.iterdir()) == []
    made.close()
