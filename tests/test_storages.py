"""A storage is one class and one entry in the table: one that keeps files in memory, put in from here, serves all that
reads models and adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base
from gguf import GGUFReader
from hub_tools import cli, content, record

from fossil_export import convert, inspect, load_adapter, merge, plan_merge, verify
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._header import Header, header_length, parse_header
from fossil_export.checkpoints._weights_file import header_of
from fossil_export.errors import CheckpointError, FossilExportError
from fossil_export.storage import STORAGES, ModelName, Origin, Storage, fetch, find_origin, parse_name, pinned


class MemoryFolder:
    """Files in a dict. `fetched` are the names of those that were brought to `path`, `nbytes` what was read otherwise
    of weights."""

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        self.files = files
        self.path = path
        self.fetched: list[str] = []
        self.nbytes = 0

    @property
    def is_here(self) -> bool:
        return all((self.path / name).is_file() for name in self.files)

    def names(self) -> list[str]:
        return sorted(self.files)

    def root_names(self) -> list[str]:
        return [name for name in self.names() if "/" not in name]

    def headers(self, names: Iterable[str]) -> tuple[Header, ...]:
        return tuple(self._header(self.path / name, self.files[name]) for name in names)

    def _header(self, path: Path, content: bytes) -> Header:
        length = header_length(path, content[:8], len(content))
        return parse_header(path, content[:length], len(content))

    def read(self, name: str) -> bytes:
        return self.files[name]

    def size(self, name: str) -> int:
        return len(self.files[name])

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        self.nbytes += nbytes
        return np.frombuffer(self.files[name][offset : offset + nbytes], np.uint8)

    def blob(self, name: str) -> str | None:
        return None

    def fetch(self, names: Iterable[str]) -> None:
        for name in names:
            if not (self.path / name).is_file():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).write_bytes(self.files[name])
                self.fetched.append(name)

    def check(self, headers: Iterable[Header]) -> None:
        assert all(header_of(header.path).encoded == header.encoded for header in headers)

    def check_links(self, names: Iterable[str]) -> None:
        pass


class MemoryStorage(Storage):
    addresses = ("mem://",)

    def __init__(self, folders: Mapping[str, MemoryFolder]) -> None:
        self.folders = folders

    def find(self, given: str | Path, error: type[FossilExportError], what: str) -> Origin | None:
        text = str(given)
        if not text.startswith(self.addresses):
            return None
        name, _, revision = text.removeprefix("mem://").partition("@")
        folder, _, file = name.partition("/")
        if folder not in self.folders:
            raise error(f"{text}: no such {what} in memory; put it there")
        return Origin(f"mem://{name}", self.folders[folder], file or None, "first", revision or None)

    def parse(self, name: str) -> ModelName | None:
        return ModelName(name) if name.startswith(self.addresses) else None

    def pinned(self, name: str, revision: str) -> str:
        return name if "@" in name else f"{name}@{revision}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_adapter(folder / "adapter", make_base(folder / "base"))
    return folder


@pytest.fixture
def memory(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStorage:
    folders = {}
    for name in ("base", "adapter"):
        local = LocalFolder(models / name)
        files = {file: local.read(file) for file in local.names()}
        folders[name] = MemoryFolder(files, tmp_path / "cache" / name)
    storage = MemoryStorage(folders)
    monkeypatch.setitem(STORAGES, "memory", storage)
    return storage


def without_names(found: dict[str, Any]) -> dict[str, Any]:
    return found | {part: {**found[part], "name": "", "revision": ""} for part in ("base", "adapter")}


def test_the_order_of_the_table() -> None:
    assert list(STORAGES) == ["local", "hub", "fsspec"]


def test_plans_fetch_nothing(memory: MemoryStorage, models: Path) -> None:
    adapter = load_adapter("mem://adapter")
    assert (adapter.name, adapter.revision, adapter.is_here) == ("mem://adapter", "first", False)
    plan = plan_merge(adapter, "mem://base")
    assert (plan.base_name, plan.base_revision, plan.base_branch) == ("mem://base", "first", None)
    assert plan_merge(adapter, "mem://base@first").base_branch == "first"
    here = plan_merge(models / "adapter", models / "base")
    assert plan.to_dict()["tensors"] == here.to_dict()["tensors"] and len(plan.to_dict()["tensors"]) == 14
    assert memory.folders["base"].fetched == [] and memory.folders["adapter"].fetched == ["adapter_config.json"]
    assert memory.folders["base"].nbytes == memory.folders["adapter"].nbytes == 0

    needed = {one.folder.path.name: set(one.names) for one in plan.needed}
    assert needed["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert needed["base"] == set(memory.folders["base"].files)
    fetch(*plan.needed)
    assert adapter.is_here and set(memory.folders["base"].fetched) == needed["base"]


def test_inspect(memory: MemoryStorage, models: Path) -> None:
    found = inspect("mem://adapter", "mem://base")
    known = inspect(models / "adapter", models / "base").to_dict()
    assert found.problems == () and found.plan is not None and memory.folders["base"].fetched == []
    assert found.to_dict()["base_tensors"] == known["base_tensors"] and found.to_dict()["adapter"] == "mem://adapter"
    (problem,) = inspect("mem://adapter", "mem://nothing").problems
    assert problem == "mem://nothing: no such base model in memory; put it there"


def test_merge(memory: MemoryStorage, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "here", base=models / "base")
    cli("merge", "mem://adapter", "--base", "mem://base", "-o", tmp_path / "there")
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    del here["fossil_export.json"], there["fossil_export.json"]
    assert here == there and len(here) > 6
    mine, theirs = record(tmp_path / "here"), record(tmp_path / "there")
    assert (theirs["base"]["name"], theirs["base"]["revision"]) == ("mem://base", "first")
    assert (theirs["adapter"]["name"], theirs["adapter"]["revision"]) == ("mem://adapter", "first")
    assert without_names(mine) == without_names(theirs)

    result = verify(tmp_path / "there", level="weights")  # by the names in its record
    assert result.parity and result.base_name == "mem://base@first"


def test_the_base_that_the_adapter_names(memory: MemoryStorage, tmp_path: Path) -> None:
    adapter = replace(load_adapter("mem://adapter"), base_model="mem://base", base_revision="first")
    assert plan_merge(adapter).base_branch == "first"


def test_a_state_dict_and_the_tokenizer_beside_it(memory: MemoryStorage, models: Path, tmp_path: Path) -> None:
    (tmp_path / "rwkv").mkdir()
    torch.save({"model.layers.0.self_attn.q_proj.disha": torch.ones(8, 48)}, tmp_path / "rwkv" / "trained.pth")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "rwkv" / name).write_text('{"of": "the adapter"}')
    files = {path.name: path.read_bytes() for path in (tmp_path / "rwkv").iterdir()}
    memory.folders = {**memory.folders, "rwkv": MemoryFolder(files, tmp_path / "cache" / "rwkv")}
    merge(tmp_path / "rwkv" / "trained.pth", tmp_path / "here", base=models / "base")
    result = merge("mem://rwkv/trained.pth", tmp_path / "there", base="mem://base")
    assert result.plan.adapter.name == "mem://rwkv/trained.pth" and result.plan.adapter.nbytes > 0
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    del here["fossil_export.json"], there["fossil_export.json"]
    assert here == there and there["tokenizer.json"] == b'{"of": "the adapter"}'


@pytest.mark.parametrize("to", ["lora", "gguf-lora", "miss"])
def test_convert(memory: MemoryStorage, models: Path, tmp_path: Path, to: str) -> None:
    convert(models / "adapter", tmp_path / "here", to=to, base=models / "base")
    convert("mem://adapter", tmp_path / "there", to=to, base="mem://base")
    if to == "gguf-lora":
        here, there = (
            {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / name).tensors}
            for name in ("here", "there")
        )
        found = (tmp_path / "there").read_bytes()
        assert here == there and b'"mem://base"' in found and b"huggingface.co" not in found
        return
    here_files, there_files = content(tmp_path / "here"), content(tmp_path / "there")
    assert here_files["adapter_model.safetensors"] == there_files["adapter_model.safetensors"]
    assert record(tmp_path / "there")["adapter"]["name"] == "mem://adapter"
    if to == "lora":
        assert b'"base_model_name_or_path": "mem://base"' in there_files["adapter_config.json"]
    assert not [name for name in memory.folders["base"].fetched if name.endswith(".safetensors")]


def test_an_artifact(memory: MemoryStorage, models: Path, tmp_path: Path) -> None:
    """What lies elsewhere is verified, and nothing written into the cache; errors have its name."""
    merge(models / "adapter", tmp_path / "merged", base=models / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    artifact = MemoryFolder(files, tmp_path / "cache" / "artifact")
    memory.folders = {**memory.folders, "artifact": artifact, "empty": MemoryFolder({}, tmp_path / "cache" / "empty")}
    result = verify("mem://artifact", base="mem://base", adapter="mem://adapter", level="weights")
    assert result.parity and set(artifact.fetched) == set(files)
    assert not (artifact.path / "fossil_parity.json").exists()
    with pytest.raises(CheckpointError, match=r"^mem://empty: holds no model, LoRA or ONNX graph; name what"):
        verify("mem://empty", level="weights")


def test_names(memory: MemoryStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_name("mem://base") == ModelName("mem://base") and pinned("mem://base", "first") == "mem://base@first"
    assert parse_name("/models/base") is None is parse_name(None)
    assert parse_name("hf://ada/base/sub") == ModelName("ada/base", "sub", "https://huggingface.co/ada/base")
    # An address is one whatever folder there is here; any other name is a path first.
    monkeypatch.chdir(tmp_path)
    Path("mem:/base").mkdir(parents=True)
    Path("other:/base").mkdir(parents=True)
    assert not find_origin("mem://base", CheckpointError, "base model").is_path
    assert find_origin("other://base", CheckpointError, "base model").is_path
