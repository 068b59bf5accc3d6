"""Parts of a merge that do not belong together, are missing, damaged or killed: told, and made again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import resumed_tools
from hub_tools import content
from merge_parts_tools import left, run

from fossil_export import FossilExportError, finish_merge, merge, merge_part, plan_merge
from fossil_export.errors import MergeError, OutputError
from fossil_export.merging._parts import division
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal
from fossil_export.writing._output import OutputFile

own = resumed_tools.own


def test_what_is_missing_is_named(own: Path) -> None:
    command = [own / "qv", "-o", own / "merged"]
    none = run(*command, "--finish", code=1).stderr
    assert "merged: no part is finished yet; run all parts (--part 1/N … N/N), then finish" in none
    assert not list(own.glob(".merged*"))
    plan = plan_merge(own / "qv")
    parts = division(plan, 4)
    for number in (1, 3):
        run(*command, "--part", f"{number}/4")
    told = run(*command, "--finish", code=1).stderr
    assert all(file.name in told for number in (1, 3) for file in parts[number])
    assert not any(file.name in told for number in (0, 2) for file in parts[number])
    assert "run --part 2/4, 4/4, then finish" in told and not (own / "merged").exists()
    run(*command, "--part", "1/2")
    assert "run the parts that have them" in run(*command, "--finish", code=1).stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"adapter": "k"}, "another adapter"),
        ({"options": ["--dtype", "bfloat16"]}, "another options (--dtype auto, --into trained, --device cpu, now"),
    ],
)
def test_parts_of_other_inputs_are_refused(change: dict[str, Any], told: str, own: Path) -> None:
    run(own / "qv", "-o", own / "merged", "--part", "1/2")
    other = [own / change.get("adapter", "qv"), "-o", own / "merged", *change.get("options", [])]
    for last in (["--part", "2/2"], ["--finish"]):
        words = run(*other, *last, code=1).stderr
        assert told in words and "remove" in words and words.count("\n") == 1, words
    run(own / "qv", "-o", own / "merged", "--part", "2/2")
    run(own / "qv", "-o", own / "merged", "--finish")


def test_a_base_that_changed_between_the_parts_is_refused(own: Path) -> None:
    run(own / "qv", "-o", own / "merged", "--part", "1/2")
    os.utime(next((own / "base").glob("*.safetensors")), ns=(1, 1))
    assert "another base" in run(own / "qv", "-o", own / "merged", "--part", "2/2", code=1).stderr


def test_a_part_that_is_killed_in_the_middle_runs_again(own: Path) -> None:
    child = os.fork()
    if child == 0:
        write = OutputFile.write

        def once(self: OutputFile, offset: int, data: Any) -> None:
            write(self, offset, data)
            if offset > 0:
                os.kill(os.getpid(), signal.SIGKILL)

        OutputFile.write = once  # type: ignore[method-assign]
        merge_part(plan_merge(own / "qv"), own / "merged", (1, 2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder,) = own.glob(".merged.partial-parts")
    assert list(folder.glob("writing-*")) != []
    plan = plan_merge(own / "qv")
    merge_part(plan, own / "merged", (2, 2))
    assert list(folder.glob("writing-*")) == []
    merge_part(plan, own / "merged", (1, 2))
    finish_merge(plan, own / "merged")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole")


def test_a_finished_file_that_was_changed_is_missing(own: Path) -> None:
    plan = plan_merge(own / "qv")
    merge_part(plan, own / "merged", (1, 1))
    path = own / ".merged.partial-parts" / "result" / plan.files[2].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MergeError, match=rf"{plan.files[2].name} of 7 files is missing; run --part 1/1"):
        finish_merge(plan, own / "merged")
    assert merge_part(plan, own / "merged", (1, 1)).resumed == 6
    finish_merge(plan, own / "merged")


def test_of_a_folder_that_was_replaced_by_an_end_that_was_killed_nothing_stays(own: Path) -> None:
    """It lies where the parts were, and they are made again there."""
    merge(own / "k", own / "merged")
    (own / "merged" / "folder" / "in").mkdir(parents=True)
    (own / "merged" / "folder" / "file").write_bytes(b"mine")
    (own / "merged" / "link").symlink_to(own / "base")
    plan = plan_merge(own / "qv")
    merge_part(plan, own / "merged", (1, 1), overwrite=True)
    child = os.fork()
    if child == 0:
        staging.sync_name = lambda output: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        finish_merge(plan, own / "merged", overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (own / ".merged.partial-parts" / "result" / "link").is_symlink()
    merge_part(plan, own / "merged", (1, 1), overwrite=True)
    finish_merge(plan, own / "merged", overwrite=True)
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole") and left(own) == ["merged"]
    assert all(path.is_file() for path in (own / "merged").iterdir()) and not (own / "merged" / "link").exists()


def test_a_failing_part_leaves_what_others_have_made(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(own / "qv")
    done = merge_part(plan, own / "merged", (1, 2))
    with pytest.raises(RuntimeError, match="a bug"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", lambda *given: (_ for _ in ()).throw(RuntimeError("a bug")))
        merge_part(plan, own / "merged", (2, 2))
    assert {*Journal(own / ".merged.partial-parts").notes()} == {*done.files}


def test_without_locks_a_long_dead_file_is_removed_and_a_young_one_is_not(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    plan = plan_merge(own / "qv")
    monkeypatch.setattr(staging.fcntl, "flock", refused)
    merge_part(plan, own / "merged", (1, 2))
    place = own / ".merged.partial-parts"
    old, young = place / "writing-old", place / "writing-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    merge_part(plan, own / "merged", (2, 2))
    assert not old.exists() and young.exists()
    finish_merge(plan, own / "merged")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole")


def test_a_pipe_in_the_place_of_the_journal_is_not_waited_for(own: Path) -> None:
    plan = plan_merge(own / "qv")
    done = merge_part(plan, own / "merged", (1, 2))
    place = own / ".merged.partial-parts"
    note = place / "notes" / f"{done.files[0]}.json"
    note.unlink()
    os.mkfifo(note)
    assert merge_part(plan, own / "merged", (1, 2)).resumed == len(done.files) - 1
    (place / "merge.json").unlink()
    os.mkfifo(place / "merge.json")
    with pytest.raises(OutputError, match="holds no journal of parts; remove it"):
        finish_merge(plan, own / "merged")


def test_a_link_in_its_place_is_not_followed(own: Path, tmp_path: Path) -> None:
    (tmp_path / "treasure").mkdir()
    (own / ".merged.partial-parts").symlink_to(tmp_path / "treasure")
    with pytest.raises(OutputError, match="cannot be written"):
        merge_part(plan_merge(own / "qv"), own / "merged", (1, 2))
    assert list((tmp_path / "treasure").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--part", "0/3"], "--part is '0/3', expected one of how many"),
        (["--part", "4/3"], "--part is '4/3', expected"),
        (["--part", "a"], "--part is 'a', expected"),
        (["--part", "1/2", "--finish"], "--finish comes when all parts are there; leave out --part."),
        (["--finish", "--dry-run"], "--finish has no plan of its own"),
        (["--part", "1/2", "--push-to-hub", "a/b"], "--part publishes nothing"),
        (["--part", "1/2", "--push-to-hub", "a/b", "--stream"], "--part and --finish make a folder"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], told: str) -> None:
    place = [] if "--stream" in options or "--dry-run" in options else ["-o", "out"]
    assert told in run("adapter", *place, *options, code=2).stderr


def test_the_error_of_the_api_names_the_part(own: Path) -> None:
    with pytest.raises(FossilExportError, match=r"part is 3/2; parts are counted from 1"):
        merge_part(plan_merge(own / "qv"), own / "merged", (3, 2))
