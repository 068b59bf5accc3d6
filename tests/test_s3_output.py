"""Results at s3:// and fsspec's other URLs: the bytes of a local merge, all or nothing, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sparse
import torch
from click.testing import CliRunner
from conftest import QV, interruptible, make_adapter, make_base
from s3_tools import SECRET, S3Server, fault
from transformers import LlamaConfig, LlamaForCausalLM

from fossil_export import finish_merge, merge, merge_part, plan_merge
from fossil_export.cli import main
from fossil_export.errors import FossilExportError, OutputError, StorageError
from fossil_export.merging._assembling import prepare, write_files
from fossil_export.merging._merge import conclude
from fossil_export.writing.remote._place import RemotePlace

RECORD = "fossil_export.json"
TO = "s3://models/merged"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*given: str) -> str:
    """What the command prints."""
    return subprocess.run(
        [sys.executable, "-m", "fossil_export", *given], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def at(server: S3Server, prefix: str = "merged") -> dict[str, bytes]:
    found = server.objects("models", f"{prefix}/")
    return {key.removeprefix(f"{prefix}/"): content for key, content in found.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 29 MB in two files, of which each goes in several parts, an adapter, and their merge."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=6000,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="17MB")
    make_adapter(folder / "adapter", folder / "base", target_modules=QV)
    merge(folder / "adapter", folder / "merged", base=folder / "base", hash=True)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three files, each sent in one request, and two adapters."""
    folder = tmp_path_factory.mktemp("parts")
    make_base(folder / "base", shards="90KB")
    make_adapter(folder / "qv", folder / "base", target_modules=QV)
    make_adapter(folder / "k", folder / "base", target_modules=["k_proj"])
    return folder


@pytest.fixture(scope="module")
def merged(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of `parts`' base with its adapter "qv", merged here."""
    folder = tmp_path_factory.mktemp("merged")
    merge(parts / "qv", folder / "merged", base=parts / "base")
    return files_of(folder / "merged")


def put(parts: Path, adapter: str = "qv", to: str = TO, **how: Any) -> Any:
    return merge(parts / adapter, to, base=parts / "base", **how)


def test_a_model_in_many_parts_is_that_of_a_local_merge(s3: S3Server, large: Path) -> None:
    result = merge(large / "adapter", TO, base=large / "base", hash=True)
    assert result.output == TO and result.to_dict()["output"] == TO
    assert at(s3) == files_of(large / "merged")
    assert sum("partNumber" in request for request in s3.requests) >= 4
    assert s3.uploads("models") == []


def test_memory_does_not_grow_with_a_file(s3: S3Server, tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.mlp.down_proj.weight": (2048, 8192) for n in range(4)}  # 134 MB
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
    sparse.model(tmp_path / "base", config, shapes)
    sparse.adapter(
        tmp_path / "adapter",
        {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
        {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.weight": shape
            for name, (rows, columns) in list(shapes.items())[:1]
            for one, shape in (("A", (8, columns)), ("B", (rows, 8)))
        },
    )
    told = run("merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--output", TO, "--json")
    result = json.loads(told)
    assert result["output"] == TO and result["bytes"] > 130e6
    assert result["peak_memory"] < 280e6  # of which the client of S3 takes 40


@pytest.mark.parametrize("to", ["memory://some/merged", "file://{}/merged"])
def test_other_kinds_of_places(to: str, parts: Path, merged: dict[str, bytes], tmp_path: Path) -> None:
    import fsspec

    put(parts, to=to.format(tmp_path))
    system, root = fsspec.url_to_fs(to.format(tmp_path))
    found = {key.removeprefix(f"{root}/"): system.cat_file(key) for key in system.find(root)}
    assert found == merged
    with pytest.raises(OutputError, match="exists already; choose another --output or add --overwrite"):
        put(parts, to=to.format(tmp_path))


def test_nobody_ever_sees_a_half_model(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    seen = []

    def look(request: str, status: int) -> None:
        keys = set(s3.keys("models", "merged/"))
        if "merged/config.json" in keys:  # without it nothing loads a model
            there = {name: content for name, content in at(s3).items() if not name.startswith(".fossil-export/")}
            seen.append(there.keys() - {RECORD} == merged.keys() - {RECORD})
            assert all(there[name] == merged[name] for name in there)

    s3.after = look
    put(parts)
    assert seen and all(seen)
    assert at(s3) == merged


def test_a_model_is_replaced_and_never_mixed(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    put(parts, adapter="k", max_shard_size="30KB")
    old, mixed = at(s3), []
    assert old.keys() - merged.keys()
    with pytest.raises(OutputError, match=f"^{TO}: exists already; choose another --output or add --overwrite$"):
        put(parts)

    def look(request: str, status: int) -> None:
        there = {name: content for name, content in at(s3).items() if not name.startswith(".fossil-export/")}
        if "config.json" in there:
            mixed.append(not (there.items() <= old.items() or there.items() <= merged.items()))

    s3.after = look
    put(parts, overwrite=True)
    assert mixed and not any(mixed)
    assert at(s3) == merged


def test_what_is_not_ours_is_not_touched(s3: S3Server, parts: Path) -> None:
    s3.add_folder(parts / "base", "models", "merged/deeper")
    before = at(s3)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="was not written by fossil-export"):
            put(parts, overwrite=overwrite)
    assert at(s3) == before


@pytest.mark.parametrize("to", ["s3://models/in", "s3://models/in/base", "s3a://models/in/base/merged"])
def test_inputs_are_only_read(
    to: str, s3: S3Server, parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    s3.add_folder(parts / "base", "models", "in/base")
    before = s3.objects("models")
    with pytest.raises(OutputError, match=r"which (is only read|would be replaced); choose another --output"):
        merge(parts / "qv", to, base="s3://models/in/base", overwrite=True)
    assert s3.objects("models") == before


def test_from_one_place_to_another(
    s3: S3Server, parts: Path, merged: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    s3.add_folder(parts / "base", "models", "in/base")
    s3.add_folder(parts / "qv", "models", "in/qv")
    merge("s3://models/in/qv", TO, base="s3://models/in/base")
    found = at(s3)
    assert {**found, RECORD: b""} == {**merged, RECORD: b""}
    assert json.loads(found[RECORD])["base"]["name"] == "s3://models/in/base"


def test_parts_come_together(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    def plan(adapter: str = "qv") -> Any:
        return plan_merge(parts / adapter, parts / "base")

    merge_part(plan(), TO, (2, 3))
    merge_part(plan(), TO, (3, 3))
    with pytest.raises(OutputError, match="its parts were begun with another adapter"):
        merge_part(plan("k"), TO, (1, 3))
    with pytest.raises(FossilExportError, match=r"missing; run --part 1/3, then finish"):
        finish_merge(plan(), TO)
    again = merge_part(plan(), TO, (2, 3))
    assert again.resumed == len(again.files)
    merge_part(plan(), TO, (1, 3))
    assert finish_merge(plan(), TO).output == TO
    assert at(s3) == merged


def test_who_makes_a_part_need_not_know_that_a_model_is_replaced(
    s3: S3Server, parts: Path, merged: dict[str, bytes]
) -> None:
    put(parts, adapter="k")
    ready = prepare(plan_merge(parts / "qv", parts / "base"), TO, overwrite=True)
    given = ready.digest.digest, ready.digest.about
    with ready.place.assemble(*given, overwrite=True, shared=True) as assembly:
        worker = RemotePlace(TO)
        assert worker.is_begun() and not RemotePlace("s3://models/other").is_begun()
        with worker.assemble(*given, shared=True) as own:
            results = write_files(ready.plan, ready.plan.files, own)
        conclude(ready.plan, results.values(), assembly)
        assembly.publish()
    assert at(s3) == merged


def test_an_object_that_changed_is_made_again(s3: S3Server, parts: Path, merged: dict[str, bytes]) -> None:
    plan = plan_merge(parts / "qv", parts / "base")
    name = merge_part(plan, TO, (1, 1)).files[0]
    s3.client().put_object(Bucket="models", Key=f"merged/{name}", Body=merged[name][::-1])
    assert merge_part(plan, TO, (1, 1)).resumed == len(plan.files) - 1
    finish_merge(plan, TO)
    assert at(s3) == merged


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


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("s3://nowhere/merged", r"^s3://nowhere/merged\S*: there is no such bucket.*; check the address$"),
        ("gs://models/merged", "fsspec needs gcsfs for gs://: pip install gcsfs$"),
        ("s4://models/merged", "^s4://models/merged: "),
        ("hf://ada/merged", "^hf://ada/merged: is no place for --output; publish with --push-to-hub$"),
        ("sftp://ada:hunter2@host/merged", "has a password in it"),
    ],
)
def test_places_that_cannot_be_written_to(to: str, says: str, s3: S3Server, parts: Path) -> None:
    with pytest.raises(FossilExportError, match=says) as told:
        put(parts, to=to)
    assert "\n" not in str(told.value) and "hunter2" not in str(told.value)


def test_who_may_not_write_is_told_before_the_work(s3: S3Server, parts: Path) -> None:
    s3.before = lambda environ: fault("403 Forbidden") if environ["REQUEST_METHOD"] == "PUT" else None
    with pytest.raises(StorageError, match="access is denied"):
        put(parts)
    assert not any("safetensors" in request for request in s3.requests)


def test_the_hub_gets_what_is_here(s3: S3Server, parts: Path) -> None:
    given = ["merge", str(parts / "qv"), "--base", str(parts / "base"), "--output", TO, "--push-to-hub", "ada/merged"]
    told = CliRunner().invoke(main, given)
    assert told.exit_code == 2 and "--push-to-hub publishes what is on this machine" in told.output
