"""Models and adapters by their names on the Hub, read over HTTP by the real client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ADA, NOISE, make_adapter, make_base, weights
from hub_tools import CLIENT, cli, content, fetched, record
from loopback import LoopbackHub, environment, point_client_at
from safetensors.torch import load_file, save_file

from fossil_export import convert, inspect, load_adapter, merge, plan_merge, verify
from fossil_export.merging._planning import settled
from fossil_export.storage import fetch


def without_names(found: dict[str, Any]) -> dict[str, Any]:
    for part in ("base", "adapter"):
        found[part] = {**found[part], "name": "", "revision": ""}
    for entry in found["base"]["weights"]:
        entry.pop("hub_blob", None)
    return found


def test_ids_give_what_folders_give(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "here", base=models / "base")
    cli("merge", "ada/adapter", "-o", tmp_path / "there")
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    mine, theirs = record(tmp_path / "here"), record(tmp_path / "there")
    del here["fossil_export.json"], there["fossil_export.json"]
    assert here == there and len(here) > 6
    assert (theirs["base"]["name"], theirs["base"]["revision"]) == ("ada/base", hosted.head("ada/base"))
    assert (theirs["adapter"]["name"], theirs["adapter"]["revision"]) == ("ada/adapter", hosted.head("ada/adapter"))
    assert {entry["file"]: entry["hub_blob"] for entry in theirs["base"]["weights"]} == {
        name: blob for name, (_, blob) in hosted.files("ada/base").items() if name.endswith(".safetensors")
    }
    assert without_names(mine) == without_names(theirs)

    # The adapter's README.md may say that its training quantized the base.
    needed = {*here, "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert fetched(hosted) == needed and needed & set(NOISE) == {"README.md"}
    assert not any("ada/base" in seen.path and seen.path.endswith("README.md") for seen in hosted.log)
    sizes = [
        hosted.files(repo)[name][0] for repo in ("ada/base", "ada/adapter") for name in NOISE if repo == "ada/base"
    ]
    assert sum(sizes) == 30_000  # the noise would be seen
    hosted.reset_log()
    cli("merge", "ada/adapter", "-o", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "there")
    assert fetched(hosted) == set() and hosted.moved()[0] < 20_000


def test_verify_finds_what_was_merged_again(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("merge", "ada/adapter", "-o", tmp_path / "merged")
    commits = hosted.head("ada/base"), hosted.head("ada/adapter")
    changed = hosted.read("ada/base", "model-00001-of-00003.safetensors")
    hosted.commit("ada/base", {"model-00001-of-00003.safetensors": changed[:-4] + b"\0\0\0\1"})
    hosted.commit("ada/adapter", {"adapter_config.json": b"{}"})
    point_client_at(monkeypatch, hosted, tmp_path / "another machine", ADA)
    hosted.reset_log()
    result = cli("verify", tmp_path / "merged", "--level", "weights", "--json")
    told = json.loads(result.stdout)
    assert told["parity"] and result.stderr == ""
    assert {seen.path.split("/resolve/")[1].split("/")[0] for seen in hosted.log if "/resolve/" in seen.path} == {
        *commits
    }
    other = cli("verify", tmp_path / "merged", "--level", "weights", "--base", "ada/base", "--adapter",
                f"ada/adapter@{commits[1]}", code=1)  # fmt: skip
    assert "v_proj.weight 1 of 1152 elements are off" in other.stderr

    hosted.add_folder("ada/merged", tmp_path / "merged")
    assert "parity" in cli("verify", "ada/merged", "--level", "weights").stdout
    (certificate,) = tmp_path.rglob("snapshots/*/fossil_parity.json")
    assert certificate.is_symlink()  # it came with the artifact; nobody writes into the Hub's cache


def test_verify_says_the_same_of_another_base(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    merge(models / "adapter", tmp_path / "merged", base=models / "base")
    shutil.copytree(models / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    less = {name: value for name, value in weights(models / "base").items() if "layers.1" not in name}
    save_file(less, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    hosted.add_folder("ada/other", tmp_path / "base")
    here, there = (
        verify(tmp_path / "merged", base=base, adapter=models / "adapter", level="weights")
        for base in (tmp_path / "base", "ada/other")
    )
    assert not here.parity and len(here.problems) == len(there.problems) == 1
    assert here.problems[0].replace(str(here.base.location), "") == there.problems[0].replace(
        str(there.base.location), ""
    )


def test_an_adapter_is_one_file_of_weights(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    state = load_file(models / "adapter" / "adapter_model.safetensors")
    torch.save(state, tmp_path / "adapter_model.bin")
    hosted.commit("ada/adapter", {"adapter_model.bin": tmp_path / "adapter_model.bin", "optimizer.pt": b"o" * 500_000})
    assert load_adapter("ada/adapter").pickled == {}
    assert fetched(hosted) == {"adapter_config.json", "adapter_model.safetensors"}
    wanted = merge("ada/adapter", tmp_path / "merged")  # which looks into README.md, too

    hosted.commit("ada/adapter", {}, delete=["adapter_model.safetensors"])
    hosted.reset_log()
    result = merge("ada/adapter", tmp_path / "pickled")
    wanted_files = {"adapter_config.json", "adapter_model.bin", "README.md"}
    assert fetched(hosted) == wanted_files and len(result.plan.adapter.headers[0].tensors) == len(state)
    assert result.survival == wanted.survival
    assert all(torch.equal(v, weights(tmp_path / "merged")[k]) for k, v in weights(tmp_path / "pickled").items())


def test_a_subfolder_and_a_single_file_are_merged_and_found_again(
    hosted: LoopbackHub, models: Path, tmp_path: Path
) -> None:
    whole = {name: value.clone() for name, value in weights(models / "base").items()}
    one = tmp_path / "base" / "one.safetensors"
    one.parent.mkdir()
    save_file(whole, one, {"format": "pt"})
    hosted.commit("ada/base", {"fp32/one.safetensors": one})
    base = "hf://ada/base/fp32/one.safetensors"
    hosted.reset_log()
    cli("merge", "hf://ada/adapter/checkpoint-100/", "--base", base, "-o", tmp_path / "merged")
    assert fetched(hosted) == {
        "fp32/one.safetensors",
        "checkpoint-100/README.md",
        "checkpoint-100/adapter_config.json",
        "checkpoint-100/adapter_model.safetensors",
    }
    merge(models / "adapter" / "checkpoint-100", tmp_path / "here", base=one)
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {path.name for path in (tmp_path / "merged").iterdir()} == {"one.safetensors", "fossil_export.json"}
    assert (tmp_path / "merged/one.safetensors").read_bytes() == (tmp_path / "here/one.safetensors").read_bytes()
    assert record(tmp_path / "merged")["base"]["name"] == base
    hosted.commit("ada/base", {}, delete=["fp32/one.safetensors"])
    assert "parity" in cli("verify", tmp_path / "merged", "--level", "weights").stdout


@pytest.mark.skipif(CLIENT < (1, 23), reason="the client does not publish")
def test_a_lora_of_a_base_in_a_subfolder(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """PEFT loads bases from the root of a repository; the record and the card know better."""
    hosted.create("ada/nested")
    hosted.commit("ada/nested", {f"sub/dir/{path.name}": path for path in (models / "base").glob("*.*")})
    base = "hf://ada/nested/sub/dir"
    told = cli("convert", "ada/adapter", "--base", base, "--to", "lora", "-o", tmp_path / "lora")
    assert "the base lies in the folder sub/dir of its repository" in told.stderr
    assert (
        json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "ada/nested"
    )
    assert record(tmp_path / "lora")["base"]["name"] == base
    assert "parity" in cli("verify", tmp_path / "lora", "--level", "weights").stdout
    cli("push", tmp_path / "lora", "ada/lora")
    card = hosted.read("ada/lora", "README.md").decode()
    assert "base_model: ada/nested\n" in card and card.count('subfolder="sub/dir"') == 2


def test_a_base_that_does_not_fit_is_told_by_its_name(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    told = ("convert", models / "adapter", "--to", "lora", "--base", "ada/adapter", "-o", tmp_path / "out")
    assert cli(*told, code=1).stderr.startswith("error: ada/adapter: is an adapter, and no base model; ")


@pytest.fixture(scope="module")
def large(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with 30 MB that no adapter touches, and a header that the first request does not hold."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copy(models / "base" / "config.json", folder)
    tensors = {**weights(models / "base"), "model.extra.weight": torch.zeros(7_500_000)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "long": "x" * 100_000})
    return folder


def test_plans_need_headers_only(
    hosted: LoopbackHub, models: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted.add_folder("ada/large", large)
    adapter = load_adapter("ada/adapter")
    fetch(adapter.needed)

    def moved(run: Callable[[], Any]) -> Any:
        point_client_at(monkeypatch, hosted, tmp_path / f"home{len(list(tmp_path.iterdir()))}", ADA)
        hosted.reset_log()
        result = run()
        assert 100_000 < hosted.moved()[0] < 300_000
        return result

    def comparable(plan: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in plan.items() if key not in ("adapter", "base", "left_behind")}

    planned = moved(
        lambda: json.loads(cli("merge", "ada/adapter", "--base", "ada/large", "--dry-run", "--json").stdout)
    )
    assert comparable(planned) == comparable(plan_merge(adapter, large).to_dict())
    assert planned["base"] | {"path": ""} == {"name": "ada/large", "revision": hosted.head("ada/large"), "path": ""}

    seen = moved(lambda: json.loads(cli("inspect", "ada/adapter", "--base", "ada/large", "--json").stdout))
    known = inspect(adapter, large).to_dict()
    assert all(module["norm"] > 0 for module in known["modules"])
    for part in ("modules", "kinds"):  # what is measured is not known of what is on the Hub alone
        for there, here in zip(seen.pop(part), known.pop(part), strict=True):
            assert not any((there.pop("change", None) or {}).values()) and there.pop("norm", None) is None
            assert any((here.pop("change", None) or {}).values()) and here.pop("norm", 1) > 0
            assert there == here
    assert seen == known
    assert seen["problems"] == [] and not list(tmp_path.rglob(f"home?/**/{adapter.files[1].name}"))

    moved(lambda: cli("convert", "ada/adapter", "--base", "ada/large", "--to", "lora", "-o", tmp_path / "lora"))
    convert(adapter, tmp_path / "here", to="lora", base=large)
    here, there = content(tmp_path / "here"), content(tmp_path / "lora")
    assert here["adapter_model.safetensors"] == there["adapter_model.safetensors"]
    config = json.loads(there["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("ada/large", hosted.head("ada/large"))

    merge("ada/adapter", tmp_path / "merged", base="ada/large")
    merge(adapter, tmp_path / "local", base=large)
    assert content(tmp_path / "merged")["model.safetensors"] == content(tmp_path / "local")["model.safetensors"]


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_is_compared_with_an_embedding_on_the_hub(hub: LoopbackHub, tmp_path: Path, trained: bool) -> None:
    base = make_base(tmp_path / "base", tie=True)
    change: dict[str, Any] = {} if trained else {"change": lambda model: None}
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"], **change)
    hub.add_folder("ada/tied", base)
    here, there = (settled(plan_merge(tmp_path / "adapter", where)) for where in (base, "ada/tied"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert here.tensors[0].source.path != there.tensors[0].source.path
    assert here.config == there.config and here.config_edits == there.config_edits
    assert here.config_edits.get("tie_word_embeddings", True) is not trained
    assert {t.name: (t.action, t.shape) for t in here.tensors} == {t.name: (t.action, t.shape) for t in there.tensors}


def test_json_is_one_object(hosted: LoopbackHub, tmp_path: Path) -> None:
    seen = json.loads(cli("inspect", "ada/adapter", "--json").stdout)
    assert (seen["adapter"], seen["revision"]) == ("ada/adapter", hosted.head("ada/adapter"))
    assert len(seen["base_tensors"]) == 14
    command = [sys.executable, "-m", "fossil_export", "merge", "ada/adapter", "-o", str(tmp_path / "m"), "--json"]
    ran = subprocess.run(command, env=environment(hosted, tmp_path / "h"), capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["plan"]["base"]["revision"] == hosted.head("ada/base")
    assert ran.stderr == ""
