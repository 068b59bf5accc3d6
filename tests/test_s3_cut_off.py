"""Results in an object store whose making is cut off: nothing is half there, nothing is left, and it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3_output_tools
import torch
from conftest import interruptible, make_adapter, make_base
from s3_output_tools import RECORD, TO, at, files_of, put
from s3_tools import SECRET, S3Server, fault

from fossil_export import merge
from fossil_export.errors import FossilExportError, OutputError, StorageError

parts, merged, large = s3_output_tools.parts, s3_output_tools.merged, s3_output_tools.large


def test_two_runs_at_one_place_do_not_mix(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    told: list[str] = []

    def other(request: str, status: int) -> None:
        if request == "PUT /models/merged/model-00002-of-00003.safetensors":
            s3.after = None
            told.append(os.fsdecode(put_in_child(parts)))

    s3.after = other
    with pytest.raises(OutputError, match="another process writes there, too"):
        put(parts, adapter="k")
    assert told == ["0"]
    assert at(s3) == merged


def put_in_child(parts: Path, kill_at: Callable[[int], None] = lambda pid: None) -> bytes:
    """The exit code of a forked process that merges; `kill_at` is told its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            put(parts)
            code = 0
        except BaseException as problem:
            print(repr(problem), file=sys.stderr)
        finally:
            os._exit(code)
    kill_at(pid)
    _, status = os.waitpid(pid, 0)
    return str(os.waitstatus_to_exitcode(status)).encode()


def test_what_was_killed_goes_on(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    put(parts)
    whole = [request for request in s3.requests if not request.startswith("GET")]
    assert at(s3) == merged
    for number in range(2, len(whole), 11):
        s3.reset()
        s3.bucket("models")
        child: list[int] = []

        def kill(request: str, status: int, number: int = number, child: list[int] = child) -> None:
            if sum(not one.startswith("GET") for one in s3.requests) >= number and child:
                os.kill(child[0], signal.SIGKILL)

        s3.after = kill
        assert put_in_child(parts, child.append) == b"-9"
        s3.after = None
        finished = RECORD in at(s3)
        try:
            put(parts)
            assert not finished
        except OutputError as problem:
            assert finished and "exists already" in str(problem)
        assert at(s3) == merged, number
        assert s3.uploads("models") == []


def test_what_was_as_good_as_finished_is_not_mixed_with_another(
    s3: S3Server, parts: Path, merged: dict[str, bytes], tmp_path: Path
) -> None:
    put(parts, adapter="k", to=str(tmp_path / "other"))
    other, child, seen = files_of(tmp_path / "other"), [], []

    def kill(request: str, status: int) -> None:
        if request == "PUT /models/merged/config.json":
            os.kill(child[0], signal.SIGKILL)

    def look(request: str, status: int) -> None:
        there = {name: content for name, content in at(s3).items() if not name.startswith(".fossil-export/")}
        if "config.json" in there:
            seen.append(there.items() <= merged.items() or there.items() <= other.items())

    s3.after = kill
    assert put_in_child(parts, child.append) == b"-9"
    assert "config.json" in at(s3) and RECORD not in at(s3)
    s3.after = look
    assert put(parts, adapter="k").resumed == 0
    assert seen and all(seen)
    assert at(s3) == other


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_upload_that_is_cut_off_is_not_left(number: signal.Signals, s3: S3Server, large: Path) -> None:
    command = ["merge", str(large / "adapter"), "--base", str(large / "base"), "--output", TO, "--hash"]
    child: list[Any] = []

    def stop(request: str, status: int) -> None:
        if "partNumber=2" in request and child:
            child.pop().send_signal(number)

    s3.after = stop
    with interruptible():
        process = subprocess.Popen([sys.executable, "-m", "fossil_export", *command], stderr=subprocess.PIPE)
    child.append(process)
    told = process.communicate()[1].decode()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), told
    assert not child
    if number == signal.SIGKILL:
        assert len(s3.uploads("models")) == 1
        result = merge(large / "adapter", TO, base=large / "base", hash=True)
        assert at(s3) == files_of(large / "merged")
        assert result.resumed == 0
    else:
        assert at(s3) == {}
    assert s3.uploads("models") == []


def test_a_part_is_sent_again(s3: S3Server, large: Path) -> None:
    refused: list[str] = []

    def busy(environ: dict[str, Any]) -> Any:
        if "partNumber=2" in environ["QUERY_STRING"] and len(refused) < 3:
            refused.append(environ["PATH_INFO"])
            return fault("503 Slow Down")
        return None

    s3.before = busy
    merge(large / "adapter", TO, base=large / "base", hash=True)
    assert len(refused) == 3
    assert at(s3) == files_of(large / "merged")


def _busy(part: str) -> Callable[[dict[str, Any]], Any]:
    """Refuses the first request for the second file's `part`."""
    left = [1]

    def answer(environ: dict[str, Any]) -> Any:
        if left and "model-00002" in environ["PATH_INFO"] and part in environ["QUERY_STRING"]:
            left.clear()
            return fault("503 Slow Down")
        return None

    return answer


@pytest.mark.parametrize("part", ["partNumber=1&", "partNumber=2"])
def test_a_part_that_the_client_gave_up_is_sent_whole_by_who_repeats_it(
    part: str, s3: S3Server, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs repeats it then, with what is left of the body: nothing
    s3.before = _busy(part)
    merge(large / "adapter", TO, base=large / "base", hash=True)
    assert sum(part in one and "model-00002" in one for one in s3.requests) == 3
    assert at(s3) == files_of(large / "merged")


def test_a_file_of_which_not_all_arrived_is_no_file(s3: S3Server, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("fossil_export.writing.remote._uploads._Body.is_sent", True)
    s3.before = _busy("partNumber=2")
    with pytest.raises(OutputError, match=r"model-00002-of-00002.safetensors: 8,388,608 of \S+ bytes arrived; run"):
        merge(large / "adapter", TO, base=large / "base", hash=True)
    s3.before = None
    monkeypatch.undo()


def test_what_fails_is_aborted_and_goes_on_later(s3: S3Server, large: Path) -> None:
    def denied(environ: dict[str, Any]) -> Any:
        second = "model-00002" in environ["PATH_INFO"]
        return fault("403 Forbidden") if second and "partNumber=2" in environ["QUERY_STRING"] else None

    s3.before = denied
    with pytest.raises(StorageError) as told:
        merge(large / "adapter", TO, base=large / "base", hash=True)
    assert str(told.value).startswith(f"{TO}/model-00002-of-00002.safetensors: access is denied")
    assert "\n" not in str(told.value) and SECRET not in str(told.value)
    assert s3.uploads("models") == []
    s3.before = None
    assert merge(large / "adapter", TO, base=large / "base", hash=True).resumed == 1
    assert at(s3) == files_of(large / "merged")


def test_a_result_that_is_not_finite_leaves_nothing(s3: S3Server, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)

    def overflowing(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(70000.0)

    make_adapter(tmp_path / "adapter", base, change=overflowing, target_modules=["down_proj"])
    with pytest.raises(FossilExportError, match="overflows float16"):
        merge(tmp_path / "adapter", TO, base=base)
    assert at(s3) == {}


def test_a_file_whose_note_was_lost_is_not_left_out(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    def remove(request: str, status: int) -> None:
        if request == "PUT /models/merged/model-00003-of-00003.safetensors":
            s3.after = None
            s3.client().delete_object(
                Bucket="models", Key="merged/.fossil-export/notes/model-00001-of-00003.safetensors.json"
            )

    s3.after = remove
    with pytest.raises(OutputError, match=r"what was noted of model-00001-of-00003.safetensors is not there any more"):
        put(parts)
    assert "config.json" not in at(s3)
    assert put(parts).resumed == 2
    assert at(s3) == merged


def test_a_small_file_that_was_removed_at_the_end_is_missed(
    s3: S3Server, parts: Path, merged: dict[str, bytes]
) -> None:
    def remove(request: str, status: int) -> None:
        if request == "PUT /models/merged/config.json":
            s3.client().delete_object(Bucket="models", Key="merged/tokenizer.json")

    s3.after = remove
    with pytest.raises(OutputError, match=f"^{TO}/tokenizer.json: did not arrive whole, or was removed again"):
        put(parts)
    s3.after = None
    assert not {"config.json", RECORD} & at(s3).keys()
    put(parts)
    assert at(s3) == merged
