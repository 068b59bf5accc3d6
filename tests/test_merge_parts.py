"""A merge in parts: --part N/M in any number of processes, then --finish."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import edit_json
from hypothesis import given
from hypothesis import strategies as st
from test_concurrent_writers import all_at_once
from test_resumed_merges import content

from fossil_export import FossilExportError, cli, finish_merge, merge, merge_part, plan_merge
from fossil_export.errors import MergeError, OutputError
from fossil_export.merging import FilePlan
from fossil_export.merging._parts import division
from fossil_export.merging._run import Writer
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal
from fossil_export.writing._output import OutputFile


@pytest.fixture
def own(parts: Path, tmp_path: Path) -> Path:
    """A base in seven files and two adapters of it."""
    for name in ("base", "qv", "k"):
        shutil.copytree(parts / name, tmp_path / name)
        if name != "base":
            edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.main, ["merge", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert code == 0 or "Traceback" not in result.output
    return result


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in {"base", "qv", "k", "whole"})


def test_parts_in_any_order_and_their_end_are_the_whole(own: Path) -> None:
    command = [own / "qv", "-o", own / "merged"]
    for number in (3, 1, 2):
        told = run(*command, "--part", f"{number}/3").stdout
    assert "nothing; run the same with --finish" in told and not (own / "merged").exists()
    run(*command, "--finish")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole") and left(own) == ["merged"]


def test_parts_at_once_in_several_processes(own: Path) -> None:
    """Each of them twice, and of two divisions, so that two processes write one file."""
    plan = plan_merge(own / "qv")
    wanted = [(number, 3) for number in (1, 2, 3)] * 2 + [(1, 2), (2, 2)]
    told = all_at_once([lambda part=part: merge_part(plan, own / "merged", part) for part in wanted])  # type: ignore[misc]
    assert told == [None] * len(wanted)
    finish_merge(plan, own / "merged")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole") and left(own) == ["merged"]


def test_only_one_of_many_ends_publishes_and_the_model_is_whole(own: Path) -> None:
    plan = plan_merge(own / "qv")
    merge_part(plan, own / "merged", (1, 1))
    told = all_at_once([lambda: finish_merge(plan, own / "merged") for _ in range(4)])
    assert told.count(None) == 1 and all(line is None or "\n" not in line for line in told), told
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole")


def test_a_part_again_writes_nothing_and_other_divisions_go_on(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Writer.write

    def counted(self: Writer, file: FilePlan, *given: Any, **options: Any) -> Any:
        written.append(file.name)
        return write(self, file, *given, **options)

    monkeypatch.setattr(Writer, "write", counted)
    plan = plan_merge(own / "qv")
    first = merge_part(plan, own / "merged", (3, 16))
    assert written == list(first.files) != []
    again = merge_part(plan, own / "merged", (3, 16))
    assert (again.resumed, again.nbytes, written) == (len(again.files), 0, list(first.files))
    last = [merge_part(plan, own / "merged", (number, 2)) for number in (1, 2)][-1]
    assert sorted(written) == sorted(file.name for file in plan.files) and last.missing == ()
    finish_merge(plan, own / "merged")


def test_a_part_may_be_files_by_name(own: Path) -> None:
    plan = plan_merge(own / "qv")
    names = [file.name for file in plan.files]
    assert merge_part(plan, own / "merged", names[2:4]).files == tuple(names[2:4])
    with pytest.raises(MergeError, match="x: is no file of this merge"):
        merge_part(plan, own / "merged", ["x"])


def test_more_parts_than_files(own: Path) -> None:
    told = run(own / "qv", "-o", own / "merged", "--part", "9/9").stdout
    assert "none: there are more parts than files" in told
    for number in range(1, 10):
        run(own / "qv", "-o", own / "merged", "--part", f"{number}/9")
    run(own / "qv", "-o", own / "merged", "--finish")
    run(own / "qv", "-o", own / "huge", "--part", "999999999/999999999")


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


def test_a_folder_that_exists_is_not_touched_without_overwrite(own: Path) -> None:
    merge(own / "k", own / "merged")
    old = content(own / "merged")
    for last in (["--part", "1/1"], ["--finish"]):
        assert "exists already" in run(own / "qv", "-o", own / "merged", *last, code=1).stderr
    run(own / "qv", "-o", own / "merged", "--overwrite", "--part", "1/1")
    assert content(own / "merged") == old
    run(own / "qv", "-o", own / "merged", "--overwrite", "--finish")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole") and left(own) == ["merged"]


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


def test_a_plain_merge_takes_up_parts_that_nobody_makes_any_more(own: Path) -> None:
    plan = plan_merge(own / "qv")
    some = merge_part(plan, own / "merged", (1, 2))
    result = merge(own / "qv", own / "merged")
    assert result.resumed == len(some.files) > 0 and left(own) == ["merged"]
    merge_part(plan, own / "other", (1, 2))
    result = merge(own / "k", own / "other")
    assert any("another adapter" in line for line in result.warnings) and left(own) == ["merged", "other"]


def test_hashes_come_from_the_parts_or_are_computed_at_the_end(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(own / "qv")
    merge_part(plan, own / "merged", (1, 2), hash=True)
    merge_part(plan, own / "merged", (2, 2))
    finish_merge(plan, own / "merged", hash=True)
    merge(own / "qv", own / "whole", hash=True)
    assert content(own / "merged") == content(own / "whole")
    assert len(json.loads((own / "merged" / "fossil_export.json").read_text())["files"]) == 7


def test_a_part_wants_room_for_its_own_files_alone(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(own / "qv")
    size = sum(file.size for file in division(plan, 7)[0])
    usage = shutil.disk_usage(own)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=size))
    merge_part(plan, own / "merged", (1, 7))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert merge_part(plan, own / "merged", (1, 7)).resumed == 1  # nothing to write
    with pytest.raises(OutputError, match="has 10 free; make room"):
        merge_part(plan, own / "merged", (2, 7))


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


def test_a_dry_run_shows_the_files_of_a_part(own: Path) -> None:
    plan = plan_merge(own / "qv")
    files = division(plan, 3)[1]
    told = run(own / "qv", "--dry-run", "--part", "2/3").stdout
    assert all(file.name in told for file in files) and plan.files[0].name in told + files[0].name
    found = json.loads(run(own / "qv", "--dry-run", "--part", "2/3", "--json").stdout)
    assert found["part"] == "2/3" and [one["file"] for one in found["files"]] == [file.name for file in files]
    assert not [path for path in own.iterdir() if path.name.startswith(".merged")]


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


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.integers(1, 50))
def test_parts_have_all_files_once_and_about_the_same_size(sizes: list[int], count: int) -> None:
    class Plan:
        files = tuple(FilePlan(f"{number}", b"", (), size) for number, size in enumerate(sizes))

    parts = division(Plan, count)  # type: ignore[arg-type]
    assert len(parts) == count and sorted(f.name for p in parts for f in p) == sorted(f.name for f in Plan.files)
    loads = [sum(file.size for file in part) for part in parts]
    assert max(loads) <= sum(sizes) / count + max(sizes)


def test_the_error_of_the_api_names_the_part(own: Path) -> None:
    with pytest.raises(FossilExportError, match=r"part is 3/2; parts are counted from 1"):
        merge_part(plan_merge(own / "qv"), own / "merged", (3, 2))


def test_a_part_fetches_what_it_reads_and_the_end_no_weights(hosted: Any, tmp_path: Path) -> None:
    plan = plan_merge("ada/adapter")
    sources = {file.name for file in plan.files}

    def fetched() -> set[str]:
        return {path.name for path in (tmp_path / "home").rglob("snapshots/*/model-*.safetensors")}

    assert len(sources) > 2 and fetched() == set()
    first = merge_part(plan, tmp_path / "merged", (1, 2))
    assert fetched() == {*first.files} < sources
    merge_part(plan, tmp_path / "merged", (2, 2))
    for path in (tmp_path / "home").rglob("snapshots/*/model-*.safetensors"):
        path.unlink()
    run("ada/adapter", "-o", tmp_path / "merged", "--finish", "--push-to-hub", "ada/merged")
    assert fetched() == set() and sources <= {*hosted.files("ada/merged")}
    merge("ada/adapter", tmp_path / "whole")
    card = {"README.md"}
    assert {k: v for k, v in content(tmp_path / "merged").items() if k not in card} == content(tmp_path / "whole")
