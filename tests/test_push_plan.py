"""`push --dry-run` and `plan_push`: what would go and what it would meet, and that nothing is made or sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_tools import cli, nobody_there, offline
from loopback import LoopbackHub
from push_tools import litter, made

from fossil_export import (
    FossilExportError,
    PushPlan,
    merge,
    plan_merge,
    plan_onnx,
    plan_push,
    plan_stream,
    push,
    run_merge,
    run_onnx,
    run_push,
    run_stream,
)
from fossil_export.errors import CheckpointError, HubError, MissingExtraError, longer

ASKING = {"GET", "HEAD"}


def asked_only(hub: LoopbackHub) -> bool:
    return {seen.method for seen in hub.log} <= ASKING


@pytest.mark.parametrize("kind", ["merged", "lora", "miss", "gguf-file", "onnx"])
def test_a_push_does_what_its_plan_says(kind: str, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    artifact = made(kind, hosted, models, tmp_path / "artifact")
    litter(tmp_path / "artifact")
    hosted.log.clear()
    plan = plan_push(artifact, "ada/new", private=True)
    assert asked_only(hosted) and plan.exists is False and plan.unchecked == () and plan.removed == ()
    with pytest.raises(KeyError):
        hosted.files("ada/new")
    result = run_push(plan)
    assert set(result.files) == {*plan.files, "README.md"} and result.nbytes == plan.nbytes
    assert (result.left_behind, result.repo_id) == (plan.left_behind, plan.repo_id)
    assert hosted.commits("ada/new")[0] == plan.title and set(result.warnings) == set(plan.warnings)
    again = plan_push(artifact, "ada/new", private=True)
    assert again.exists and again.card == plan.card
    assert not push(artifact, "ada/new").changed


def test_the_plan_as_data(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "out")
    litter(folder)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nreleased: 2026-01-31\nlimit: .inf\n2026-02-01: [.nan]\n---\n\nMine.\n"
    )
    plan = plan_push(folder, "ada/new", revision="v2", commit_message="Second")
    assert repr(plan).startswith("<PushPlan of ") and "\n" not in repr(plan) and len(repr(plan)) < 400
    found = json.loads(cli("push", folder, "ada/new", "--revision", "v2", "--dry-run", "--json").stdout)
    assert found == json.loads(json.dumps(plan.to_dict())) | {"title": "Upload merged model with fossil-export"}
    assert {"file": "config.json", "bytes": (folder / "config.json").stat().st_size} in found["files"]
    assert (found["card"]["limit"], found["card"]["2026-02-01"]) == ("inf", ["nan"])
    assert found["card"]["license"] == "mit" and found["card"]["base_model"] == "ada/base"
    assert "notes.txt" in found["left_behind"] and plan.title == "Second"
    table = cli("push", folder, "ada/new", "--dry-run").stdout
    assert "a new repository" in table and "notes.txt" in table and "model-00001-of-00003.safetensors" in table


def test_what_it_would_meet(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    adapter = made("miss", hosted, models, tmp_path / "adapter")
    push(adapter, "ada/new")
    hosted.log.clear()
    with pytest.raises(FossilExportError, match="holds an adapter, which loaders would put on top"):
        plan_push(merge("ada/adapter", tmp_path / "out").output, "ada/new")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    plan = plan_push(adapter, "ada/new", create_pr=True)
    assert plan.removed == ("adapter_model.safetensors",)
    assert any("will go with the commit" in line for line in plan.warnings)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    branched = plan_push(adapter, "ada/new", revision="later", private=True)
    assert branched.warnings[0] == "ada/new: exists already and stays public; --private is for a new one"
    assert branched.exists and branched.removed == () and asked_only(hosted)


def test_a_name_without_its_owner(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    assert plan_push(made("lora", hosted, models, tmp_path / "lora"), "new").repo_id == "ada/new"


def test_nobody_need_be_logged_in(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("lora", hosted, models, tmp_path / "lora")
    push(folder, "ada/new")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    plan = plan_push(folder, "ada/new")
    assert plan.exists and len(plan.unchecked) == 1 and "whether you may write there" in plan.unchecked[0]
    bare = plan_push(folder, "new")
    assert bare.exists is None and "hf auth login" in bare.unchecked[0] and bare.repo_id == "new"
    assert cli("push", folder, "ada/new", "--dry-run").stdout.count("not checked") == 1


@pytest.mark.parametrize("away", [offline, nobody_there])
def test_a_hub_that_cannot_be_asked(
    away: object, hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("lora", hosted, models, tmp_path / "lora")
    assert callable(away)
    away(hosted, monkeypatch, tmp_path)
    monkeypatch.setattr("fossil_export.storage.hub._errors.PAUSE", 0.0)
    plan = plan_push(folder, "ada/new")
    assert plan.exists is None and len(plan.unchecked) == 1 and plan.files
    assert "what the repository holds was not checked" in plan.unchecked[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
@pytest.mark.parametrize("gone", [False, True])
def test_what_changes_after_the_plan_is_not_sent(
    gone: bool, name: str, hosted: LoopbackHub, models: Path, tmp_path: Path
) -> None:
    folder = made("lora", hosted, models, tmp_path / "lora")
    (folder / "README.md").write_text("Mine.\n")
    plan = plan_push(folder, "ada/new")
    hosted.log.clear()
    if gone:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[::-1])  # of the same size
    with pytest.raises(CheckpointError, match=rf"{name}: has changed since the push was planned"):
        run_push(plan)
    assert hosted.log == []


def test_a_plan_knows_its_folder_from_elsewhere(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("lora", hosted, models, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    plan = plan_push("lora", "ada/new")
    monkeypatch.chdir("/")
    assert run_push(plan).changed and plan.folder == "lora"


def test_inputs_that_are_gone(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    merge_plan, onnx_plan = plan_merge("ada/adapter", base), plan_onnx("ada/adapter", base, runtime="torch")
    shutil.rmtree(base)
    for run in (lambda: run_merge(merge_plan, tmp_path / "out"), lambda: run_onnx(onnx_plan, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            run()  # the output does not lie inside what is gone


def test_plans_of_merges_run(hosted: LoopbackHub, tmp_path: Path) -> None:
    plan = plan_merge("ada/adapter")
    result = run_merge(plan, tmp_path / "out")
    assert result.plan is plan and (tmp_path / "out" / "config.json").is_file()
    streamed = run_stream(plan_stream("ada/adapter"), "ada/new", cache_dir=tmp_path / "cache")
    assert hosted.head("ada/new") == streamed.push.commit
    assert isinstance(plan_push(result.output, "ada/other"), PushPlan)


def test_errors_are_made_longer_not_changed() -> None:
    for problem in (HubError("short"), MissingExtraError("peft", "peft", "this")):
        more = longer(problem, " (and more)")
        assert type(more) is type(problem) and str(more) == f"{problem} (and more)"
        assert "more" not in str(problem)
