"""Results at s3:// and fsspec's other URLs: the bytes of a local merge, in one piece, and nobody sees a half model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3_output_tools
import sparse
from click.testing import CliRunner
from s3_output_tools import RECORD, TO, at, files_of, put, run
from s3_tools import S3Server, fault

from fossil_export import finish_merge, merge, merge_part, plan_merge
from fossil_export.cli import main
from fossil_export.errors import FossilExportError, OutputError, StorageError
from fossil_export.merging._assembling import prepare, write_files
from fossil_export.merging._merge import conclude
from fossil_export.writing.remote._place import RemotePlace

parts, merged, large = s3_output_tools.parts, s3_output_tools.merged, s3_output_tools.large


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


@pytest.mark.parametrize("to", ["gs://models/in", "gcs://models/in/", "gcs://models/in/merged"])
def test_inputs_by_other_names_are_only_read(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fossil_export.writing.remote._place.Store", lambda address: SimpleNamespace(address=address))
    with pytest.raises(OutputError, match="choose another --output"):
        RemotePlace(to).check([], True, ["gcs://models/in" if to.startswith("gs") else "gs://models/in"])


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


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("s3://nowhere/merged", r"^s3://nowhere/merged\S*: there is no such bucket.*; check the address$"),
        ("gs://models/merged", "^writing to gs:// needs gcsfs: .*install gcsfs$"),
        ("s4://models/merged", "^s4://models/merged: "),
        ("hf://ada/merged", "^hf://ada/merged: is no place for --output; publish with --push-to-hub$"),
        ("sftp://ada:hunter2@host/merged", "has a password in it"),
        ("s3://", "^s3://: names no folder or file"),
        ("simplecache::s3://models/merged", "is a chain of addresses"),
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
