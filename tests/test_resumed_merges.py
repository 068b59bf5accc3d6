"""A merge that was interrupted goes on where it was: byte for byte the same, and no finished file is written twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import progress_tools
import pytest
import resumed_tools
from click.testing import CliRunner
from conftest import QV, interruptible, make_adapter, make_base
from hub_tools import content
from progress_tools import in_the_middle
from resumed_tools import Stop, interrupt, kept

from fossil_export import FossilExportError, Progress, cli, merge, plan_merge
from fossil_export.errors import MergeError
from fossil_export.writing import _assembly as assembly_module
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal
from fossil_export.writing._output import OutputFile

own = resumed_tools.own
written = resumed_tools.written
every_slab = progress_tools.every_slab


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three files and an adapter of its q_proj and v_proj."""
    folder = tmp_path_factory.mktemp("small")
    make_base(folder / "base", shards="100KB")
    make_adapter(folder / "qv", folder / "base", target_modules=QV)
    return folder


def killed(folder: Path, at: int) -> bool:
    """A merge in a process of its own that kills itself when it has the disk for the `at`-th time: before a piece is
    written, before a file or a note has its name, before the folder is published. False if it is done before."""
    child = os.fork()
    if child == 0:
        try:
            turn = count(1)  # one after the other, whatever thread comes

            def counted(do: Callable[..., Any]) -> Callable[..., Any]:
                def step(*given: Any, **options: Any) -> Any:
                    if next(turn) == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return do(*given, **options)

                return step

            OutputFile.write = counted(OutputFile.write)  # type: ignore[method-assign]
            OutputFile.close = counted(OutputFile.close)  # type: ignore[method-assign]
            Path.replace = counted(Path.replace)  # type: ignore[method-assign]
            Path.rename = counted(Path.rename)  # type: ignore[method-assign]
            staging.sync_tree = counted(staging.sync_tree)
            staging.publish = counted(staging.publish)
            merge(folder / "qv", folder / "merged")
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_anywhere_it_goes_on_and_makes_the_same_bytes(small: Path, written: list[str]) -> None:
    """Before every piece of every file that is written, and every step between."""
    merge(small / "qv", small / "whole")
    wanted, files = content(small / "whole"), len(written)
    finished = []
    at = 1
    while killed(small, at):
        if not (small / "merged").exists():
            noted = {name for folder in kept(small) for name in Journal(folder).notes()}
            written.clear()
            result = merge(small / "qv", small / "merged")
            assert not {*written} & noted and len(written) == files - len(noted) and result.resumed == len(noted)
            finished.append(len(noted))
            assert kept(small) == []
        assert content(small / "merged") == wanted
        shutil.rmtree(small / "merged")
        at += 1
    assert at > 20 and {*finished} == {*range(files + 1)} and finished == sorted(finished)


def test_killed_again_and_again_it_gets_there(own: Path) -> None:
    merge(own / "qv", own / "whole")
    times = 0
    while killed(own, 14):
        times += 1
    assert times > 3 and content(own / "merged") == content(own / "whole") and kept(own) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_keeps_what_is_finished_and_says_nothing_of_it(number: int, own: Path) -> None:
    command = ["merge", str(own / "qv"), "-o", str(own / "merged")]
    slow = "import sys, time; from fossil_export.writing import _journal as j; add = j.Journal.add\n"
    slow += "def slowly(*given): add(*given); sys.stdout.write('noted\\n'); sys.stdout.flush(); time.sleep(30)\n"
    slow += "j.Journal.add = slowly; from fossil_export import _start; sys.argv[0] = 'fossil-export'; _start.main()"
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout is not None and process.stdout.readline() == "noted\n"
    process.send_signal(number)
    _, words = process.communicate(timeout=25)
    assert (process.returncode, words) == (128 + number, "Aborted!\n" if number == signal.SIGINT else "")
    assert len(kept(own)) == 1
    result = CliRunner().invoke(cli.main, [*command, "--json"])
    assert json.loads(result.stdout)["resumed"] == 1
    assert "taken up where an earlier run was interrupted; 1 file is of that, of 7" in result.stderr
    assert kept(own) == []


@pytest.mark.usefixtures("every_slab")
def test_without_a_finished_file_nothing_is_kept(own: Path) -> None:
    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        merge(own / "qv", own / "new" / "merged", progress=in_the_middle(stop))
    assert not (own / "new").exists()


def test_an_error_removes_what_is_finished(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, left = Journal.add, [3]

    def fail(self: Journal, *given: Any) -> None:
        add(self, *given)
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", fail)
    with pytest.raises(FossilExportError, match="No space left on device; make room"):
        merge(own / "qv", own / "merged")
    assert kept(own) == []


def test_hashes_of_files_that_were_finished_before_are_recorded(own: Path) -> None:
    interrupt(own)
    merge(own / "qv", own / "merged", hash=True)
    merge(own / "qv", own / "whole", hash=True)
    assert content(own / "merged") == content(own / "whole")
    shutil.rmtree(own / "merged")
    interrupt(own, hash=True)
    merge(own / "qv", own / "merged")
    merge(own / "qv", own / "plain")
    assert content(own / "merged") == content(own / "plain")


def test_an_old_folder_stays_until_it_is_replaced(own: Path) -> None:
    merge(own / "k", own / "merged")
    old = content(own / "merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly_module.FolderAssembly, "publish", lambda self: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            merge(own / "qv", own / "merged", overwrite=True)
    assert content(own / "merged") == old and len(kept(own)) == 1
    assert merge(own / "qv", own / "merged", overwrite=True).resumed == 7
    assert content(own / "merged") != old and kept(own) == []


def test_progress_begins_where_it_was(own: Path) -> None:
    interrupt(own)
    told: list[Progress] = []
    result = merge(own / "qv", own / "merged", progress=told.append)
    steps = [one for one in told if one.step == "merging"]
    headers = sum(len(file.header) for file in result.plan.files)
    assert steps[1].done > 0 and steps[-1].done == steps[-1].total == result.plan.nbytes - headers


def test_too_little_room_for_the_rest_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(own, 5)
    plan = plan_merge(own / "qv")
    free = plan.nbytes + (1 << 20) - 1000  # for all of it that would be too little
    usage = shutil.disk_usage(own)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert merge(own / "qv", own / "merged").resumed == 5
    with pytest.raises((FossilExportError, MergeError), match="make room"):
        merge(own / "qv", own / "other")
