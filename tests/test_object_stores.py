"""Models and adapters at fsspec's URLs: what is made of them is what is made of the same files here, weights are read
where they lie, and only what is small comes to this machine. The store is moto's S3, asked by the real s3fs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import edit_json, make_adapter, make_base
from hub_tools import cli, content, record
from s3_tools import S3Server
from transformers import AutoModelForCausalLM

from fossil_export import convert, inspect, load_adapter, merge, plan_merge, verify
from fossil_export.errors import AdapterError, CheckpointError, MissingExtraError
from fossil_export.storage import ModelName, fetch, find_origin, parse_name, pinned


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_adapter(folder / "adapter", make_base(folder / "base"))
    edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path="s3://models/base")
    return folder


@pytest.fixture
def store(s3: S3Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("base", "adapter"):
        s3.add_folder(models / name, "models", name)
    return s3


def here(tmp_path: Path) -> set[str]:
    """Names of the files that were brought to this machine."""
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def without_names(found: dict[str, Any]) -> dict[str, Any]:
    """A record without what tells where base and adapter came from."""
    files = [{key: value for key, value in entry.items() if key != "etag"} for entry in found["base"]["weights"]]
    return found | {
        "base": {**found["base"], "name": "", "weights": files},
        "adapter": {**found["adapter"], "name": ""},
    }


def test_plans_take_one_listing_and_two_ranges_of_each_file(store: S3Server, models: Path, tmp_path: Path) -> None:
    adapter = load_adapter("s3://models/adapter")
    adapter_requests = list(store.requests)
    assert len(adapter_requests) == 4 and adapter_requests[0].startswith("GET /models?list-type=2&prefix=adapter%2F")
    store.requests.clear()
    plan = plan_merge(adapter, "s3://models/base")
    known = plan_merge(models / "adapter", models / "base")
    assert plan.to_dict()["tensors"] == known.to_dict()["tensors"] and len(plan.base.files) == 7
    # The listing, config and index, and of each file 8 bytes and the header.
    asked = [one for one in store.requests if "/adapter/" not in one]
    assert len(asked) == 1 + 2 + 2 * 7 and all(one.startswith("GET ") for one in asked)
    assert {"config.json", "model.safetensors.index.json"} <= here(tmp_path)
    assert not [name for name in here(tmp_path) if name.endswith(".safetensors")]
    fetch(*plan.needed)
    assert adapter.is_here and not [name for name in here(tmp_path) if name.startswith("model-0")]
    assert plan.base_name == "s3://models/base" and plan.base_revision is None


def test_merged_from_there_is_merged_from_here(store: S3Server, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "here", base=models / "base", hash=True)
    store.requests.clear()
    cli("merge", "s3://models/adapter", "-o", tmp_path / "there", "--hash")
    mine, theirs = content(tmp_path / "here"), content(tmp_path / "there")
    del mine["fossil_export.json"], theirs["fossil_export.json"]
    assert mine == theirs and len(mine) > 10
    assert not [name for name in here(tmp_path) if name.startswith("model-0")]

    known, found = record(tmp_path / "here"), record(tmp_path / "there")
    assert (found["adapter"]["name"], found["base"]["name"]) == ("s3://models/adapter", "s3://models/base")
    tags = [entry["etag"] for entry in found["base"]["weights"]]
    assert tags == [tag for _, tag in sorted(etags(store).items())]
    assert without_names(known) == without_names(found)

    store.requests.clear()
    result = verify(tmp_path / "there", level="weights")  # by the names in its record
    assert result.parity and result.base_name == "s3://models/base"
    assert not [name for name in here(tmp_path) if name.startswith("model-0")]


def etags(store: S3Server) -> dict[str, str]:
    listing = store.client().list_objects_v2(Bucket="models", Prefix="base/model-0")["Contents"]
    return {entry["Key"]: entry["ETag"].strip('"') for entry in listing}


@pytest.mark.parametrize("options", [{"max_shard_size": "70KB"}, {"dtype": "bfloat16"}])
def test_cut_and_cast(options: dict[str, Any], store: S3Server, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "here", base=models / "base", **options)
    merge(models / "adapter", tmp_path / "there", base="s3://models/base", **options)
    mine, theirs = content(tmp_path / "here"), content(tmp_path / "there")
    del mine["fossil_export.json"], theirs["fossil_export.json"]
    assert mine == theirs


def test_an_artifact_is_compared_where_it_lies(store: S3Server, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "merged", base=models / "base")
    store.add_folder(tmp_path / "merged", "models", "merged")
    result = verify("s3://models/merged", base="s3://models/base", adapter="s3://models/adapter", level="weights")
    assert result.parity and result.origin.name == "s3://models/merged"
    assert not [name for name in here(tmp_path) if name.startswith("model-0")]
    assert "fossil_parity.json" not in here(tmp_path)

    # One value of one tensor is another one.
    first = sorted((tmp_path / "merged").glob("model-0*"))[2]
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 0x40
    first.write_bytes(damaged)
    store.add_folder(tmp_path / "merged", "models", "wrong")
    result = verify("s3://models/wrong", base="s3://models/base", adapter="s3://models/adapter", level="weights")
    assert not result.parity and len(result.problems) == 1


def test_other_levels_bring_the_base_here(store: S3Server, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "merged", base="s3://models/base")
    assert not [name for name in here(tmp_path) if name.startswith("model-0")]
    assert verify(tmp_path / "merged", adapter=models / "adapter", level="weights").parity
    plan = plan_merge(models / "adapter", "s3://models/base")
    fetch(*plan.needed, whole=True)
    assert len([name for name in here(tmp_path) if name.startswith("model-0")]) == 7
    base = plan.base.home.path
    ours = AutoModelForCausalLM.from_pretrained(base).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(models / "base").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    store.requests.clear()
    merge(models / "adapter", tmp_path / "again", base="s3://models/base")
    assert not [one for one in store.requests if "model-0" in one]  # what is here is not asked for again


def test_inspect_convert_and_dry_run(store: S3Server, models: Path, tmp_path: Path) -> None:
    found = inspect("s3://models/adapter", "s3://models/base")
    assert found.problems == () and found.to_dict()["adapter"] == "s3://models/adapter"
    said = cli("merge", "s3://models/adapter", "-o", tmp_path / "out", "--dry-run").output
    assert "s3://models/base" in said and not (tmp_path / "out").exists()
    convert("s3://models/adapter", tmp_path / "lora", to="lora", base="s3://models/base")
    convert(models / "adapter", tmp_path / "known", to="lora", base=models / "base")
    name = "adapter_model.safetensors"
    assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "known" / name).read_bytes()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "s3://models/base"
    )
    assert not [one for one in here(tmp_path) if one.startswith("model-0")]


def test_other_file_systems(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory:// reads one file at a time and has no tags; file:// is this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("base", "adapter"):
        memory.put(str(models / name), f"/fossil/{name}", recursive=True)
    try:
        merge("memory://fossil/adapter", tmp_path / "there", base="memory://fossil/base")
        merge(models / "adapter", tmp_path / "here", base=models / "base")
        mine, theirs = content(tmp_path / "here"), content(tmp_path / "there")
        assert [name for name in mine if mine[name] != theirs[name]] == ["fossil_export.json"]
        assert "etag" not in record(tmp_path / "there")["base"]["weights"][0]
    finally:
        memory.rm("/fossil", recursive=True)
    origin = find_origin(f"file://{models}/base", CheckpointError, "base model")
    assert origin.is_path and origin.name == f"{models}/base"


def test_files_of_pytorch_and_single_files(store: S3Server, models: Path, tmp_path: Path) -> None:
    base = tmp_path / "pickled"
    make_base(base, shards="1GB")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    store.add_folder(base, "models", "pickled")
    merge(models / "adapter", tmp_path / "here", base=base)
    merge(models / "adapter", tmp_path / "there", base="s3://models/pickled/pytorch_model.bin")
    mine, theirs = content(tmp_path / "here"), content(tmp_path / "there")
    assert [name for name in mine if mine[name] != theirs[name]] == ["fossil_export.json"]
    assert record(tmp_path / "there")["base"]["name"] == "s3://models/pickled/pytorch_model.bin"
    assert "pytorch_model.bin" not in here(tmp_path)
    found = load_adapter("s3://models/adapter/adapter_model.safetensors")
    assert found.name == "s3://models/adapter/adapter_model.safetensors" and len(found.trained) == 14


def test_names() -> None:
    assert parse_name("s3://models/base") == ModelName("s3://models/base") == parse_name("s3://models/base")
    assert pinned("s3://models/base", "abc") == "s3://models/base"
    assert parse_name("file:///models/base") is None is parse_name("nowhere://models/base")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3://models/bas", "s3://models/bas: no such adapter there; check the address, or name another"),
        ("s3://nobody/base", "s3://nobody/base: no such adapter there"),
        ("s3://", "s3://: names no folder or file; write s3://bucket/folder"),
        ("s3://models/../base", "names no folder or file"),
        ("s3://AKIAKEYKEYKEY:hidden@models/base", "s3://…@models/base: has a password in it"),
        ("s3://models/base?X-Amz-Signature=hidden", "s3://models/base?…: has a query"),
        ("simplecache::s3://models/base", "has a query or is a chain of addresses"),
        ("gs://models/base", "reading gs:// needs gcsfs: "),
        ("az://models/base", "reading az:// needs adlfs: "),
        ("nowhere://models/base", "nowhere://models/base: no such file or folder"),
        ("file:///nowhere/at/all", "file:///nowhere/at/all: no such file or folder"),
    ],
)
def test_addresses_that_name_nothing(given: str, said: str, store: S3Server) -> None:
    with pytest.raises((AdapterError, MissingExtraError)) as found:
        load_adapter(given)
    assert str(found.value).startswith(said) or said in str(found.value)
    assert "hidden" not in str(found.value) and "\n" not in str(found.value)


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match=r"^reading s3:// needs fsspec: .*install 'fossil-export\[fsspec\]'$"):
        load_adapter("s3://models/adapter")


def test_nothing_of_it_is_imported_before_an_address_is_one(models: Path) -> None:
    code = (
        "import sys; from fossil_export import plan_merge; plan_merge(*sys.argv[1:]);"
        "assert not {'fsspec', 's3fs', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, models / "adapter", models / "base"], check=True, env=os.environ)


def test_records_and_messages_hold_no_secrets(store: S3Server, tmp_path: Path) -> None:
    cli("merge", "s3://models/adapter", "-o", tmp_path / "out")
    text = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.json")).decode()
    assert os.environ["AWS_ACCESS_KEY_ID"] not in text and os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert store.url not in text and str(tmp_path) not in text
