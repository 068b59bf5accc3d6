"""Adapters whose weights are in several files, in a subfolder, or under another name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weights
from pickled_bases import plain_base
from quantized_bases import adapter_for
from safetensors.torch import load_file, save_file

import fossil_export
from fossil_export.adapters import load_adapter
from fossil_export.errors import AdapterError

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and both merged."""
    work = tmp_path_factory.mktemp("scene")
    base = plain_base(work / "base")
    fossil_export.merge(adapter_for(base, work / "adapter"), work / "merged", base=base)
    return work


def cut(scene: Path, folder: Path, pickled: bool = False, count: int = 3) -> Path:
    """The adapter in so many files, with an index of them."""
    folder.mkdir(parents=True)
    shutil.copy(scene / "adapter" / CONFIG, folder)
    state = load_file(scene / "adapter" / "adapter_model.safetensors")
    ending = "bin" if pickled else "safetensors"
    names = {name: f"adapter_model-{at % count + 1:05d}-of-{count:05d}.{ending}" for at, name in enumerate(state)}
    for file in set(names.values()):
        own = {name: value for name, value in state.items() if names[name] == file}
        torch.save(own, folder / file) if pickled else save_file(own, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"adapter_model.{ending}.index.json").write_text(json.dumps(index))
    return folder


def merges_alike(scene: Path, adapter: Path, work: Path) -> Any:
    result = fossil_export.merge(adapter, work / "result", base=scene / "base")
    found, wanted = weights(work / "result"), weights(scene / "merged")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    return result


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_in_several_files(pickled: bool, scene: Path, tmp_path: Path) -> None:
    adapter = cut(scene, tmp_path / "cut", pickled)
    result = merges_alike(scene, adapter, tmp_path)
    record = json.loads((tmp_path / "result" / "fossil_export.json").read_text())
    assert {entry["file"] for entry in record["adapter"]["files"]} == {path.name for path in adapter.iterdir()}
    assert {header.path.suffix for header in result.plan.adapter.headers} == {".bin" if pickled else ".safetensors"}
    assert not result.plan.adapter.pickled  # by ranges too
    verdict = fossil_export.verify(tmp_path / "result", adapter=adapter, base=scene / "base", level="weights")
    assert verdict.parity, verdict.problems
    assert load_adapter(adapter / f"adapter_model.{'bin' if pickled else 'safetensors'}.index.json").trained


def test_one_file_of_several_is_no_adapter(scene: Path, tmp_path: Path) -> None:
    adapter = cut(scene, tmp_path / "cut", count=2)
    with pytest.raises(AdapterError, match=r"is one of the 2 files of an adapter; name their folder"):
        load_adapter(adapter / "adapter_model-00001-of-00002.safetensors")
    # One that is in no list is an adapter, and so is the only one of a list.
    whole = scene / "adapter" / "adapter_model.safetensors"
    for file in (shutil.copy(whole, adapter), cut(scene, tmp_path / "one", count=1) / "adapter_model-00001-of-00001"):
        found = load_adapter(Path(file).with_suffix(".safetensors"))
        assert sorted(info.name for header in found.headers for info in header.tensors) == sorted(load_file(whole))


def test_a_damaged_list_of_files(scene: Path, tmp_path: Path) -> None:
    adapter = cut(scene, tmp_path / "cut")
    index = adapter / "adapter_model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    for weight_map, words in (
        ({**good["weight_map"], first: "../adapter_model.safetensors"}, "no file in its own folder"),
        ({**good["weight_map"], first: "adapter_model-00009-of-00003.safetensors"}, "which is missing"),
        ({**good["weight_map"], "more": "adapter_model-00001-of-00003.safetensors"}, "says that more is in"),
        ({name: file for name, file in good["weight_map"].items() if name != first}, "does not list"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(AdapterError, match=words):
            load_adapter(adapter)


def test_a_list_of_pickled_and_other_files_is_refused(scene: Path, tmp_path: Path) -> None:
    adapter = cut(scene, tmp_path / "cut")
    file = adapter / "adapter_model-00002-of-00003.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, file.with_suffix(".bin").name))
    with pytest.raises(AdapterError, match=rf"lists {file.stem}.bin beside safetensors files; fetch the adapter again"):
        load_adapter(adapter)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tensor_that_two_files_hold_is_refused_with_both_of_them(pickled: bool, scene: Path, tmp_path: Path) -> None:
    one, two, _ = sorted(cut(scene, tmp_path / "cut", pickled).glob("adapter_model-*"))
    load, save = (torch.load, torch.save) if pickled else (load_file, save_file)
    name, value = next(iter(load(one).items()))
    save({**load(two), name: value}, two)
    with pytest.raises(AdapterError, match=rf"{two.name}: tensor {name} stands also in {one.name}; .*fetch them again"):
        load_adapter(tmp_path / "cut")


def test_a_file_that_is_written_to_after_it_was_read_is_an_error(scene: Path, tmp_path: Path) -> None:
    adapter = cut(scene, tmp_path / "cut")
    plan = fossil_export.plan_merge(adapter, scene / "base")
    file = adapter / "adapter_model-00002-of-00003.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(fossil_export.errors.FossilExportError, match="changed while"):
        fossil_export.run_merge(plan, tmp_path / "result")


@pytest.mark.parametrize("inside", ["checkpoint-500", "adapter_model"])
def test_the_only_adapter_in_a_folder_is_taken_and_told(inside: str, scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "adapter", tmp_path / "run" / inside)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    result = merges_alike(scene, tmp_path / "run", tmp_path)
    assert result.plan.adapter.path == tmp_path / "run" / inside
    assert any(f"the adapter in its folder {inside} is taken" in line for line in result.plan.warnings)
    record = json.loads((tmp_path / "result" / "fossil_export.json").read_text())
    assert record["adapter"]["name"] == str(tmp_path / "run" / inside)


def test_of_several_none_is_taken(scene: Path, tmp_path: Path) -> None:
    for step in (500, 1000):
        shutil.copytree(scene / "adapter", tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(AdapterError, match=r"2 in subfolders \(checkpoint-1000, checkpoint-500\): name one of them"):
        load_adapter(tmp_path / "run")
    shutil.copytree(scene / "adapter", tmp_path / "run", dirs_exist_ok=True)
    assert load_adapter(tmp_path / "run").path == tmp_path / "run"


@pytest.mark.parametrize("name", ["adapter_0.pt", "adapter_model.pt"])
def test_a_file_of_torchtune(name: str, scene: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "tuned"
    adapter.mkdir()
    shutil.copy(scene / "adapter" / CONFIG, adapter)
    state = load_file(scene / "adapter" / "adapter_model.safetensors")
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 256)}, adapter / name)
    with pytest.raises(AdapterError, match=r"layers\.0\.attn\.q_proj\.lora_a\.weight is named as torchtune"):
        load_adapter(adapter)
    torch.save(state, adapter / name)
    merges_alike(scene, adapter, tmp_path)
