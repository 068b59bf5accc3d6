"""A merge in parts: --part N/M in any number of processes, then --finish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import resumed_tools
from hub_tools import content
from hypothesis import given
from hypothesis import strategies as st
from merge_parts_tools import left, run
from test_concurrent_writers import all_at_once

from fossil_export import finish_merge, merge, merge_part, plan_merge
from fossil_export.errors import MergeError, OutputError
from fossil_export.merging import FilePlan
from fossil_export.merging._parts import division
from fossil_export.merging._run import Writer
from fossil_export.writing import _staging as staging

own = resumed_tools.own


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


def test_a_dry_run_shows_the_files_of_a_part(own: Path) -> None:
    plan = plan_merge(own / "qv")
    files = division(plan, 3)[1]
    told = run(own / "qv", "--dry-run", "--part", "2/3").stdout
    assert all(file.name in told for file in files) and plan.files[0].name in told + files[0].name
    found = json.loads(run(own / "qv", "--dry-run", "--part", "2/3", "--json").stdout)
    assert found["part"] == "2/3" and [one["file"] for one in found["files"]] == [file.name for file in files]
    assert not [path for path in own.iterdir() if path.name.startswith(".merged")]


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.integers(1, 50))
def test_parts_have_all_files_once_and_about_the_same_size(sizes: list[int], count: int) -> None:
    class Plan:
        files = tuple(FilePlan(f"{number}", b"", (), size) for number, size in enumerate(sizes))

    parts = division(Plan, count)  # type: ignore[arg-type]
    assert len(parts) == count and sorted(f.name for p in parts for f in p) == sorted(f.name for f in Plan.files)
    loads = [sum(file.size for file in part) for part in parts]
    assert max(loads) <= sum(sizes) / count + max(sizes)


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
