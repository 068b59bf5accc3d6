"""`push`, over real HTTP: the repository, what goes there and what leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_tools import cli
from loopback import LoopbackHub
from push_tools import card_of, graph, made, published
from safetensors.torch import load_file

from fossil_export import FossilExportError, convert, merge, push


def test_private_and_bare_names(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    result = push(folder, "new", private=True)
    assert result.repo_id == "ada/new" and result.url.endswith("/ada/new")
    assert hub.readable("ada", "ada/new").private and "fossil-export: begin" in card_of(hub, tmp_path)[1]
    assert not any("stays public" in line for line in result.warnings)
    hub.create("ada/public")
    for name in ("public", "ada/public"):
        assert sum("stays public" in line for line in push(folder, name, private=True).warnings) == 1
    assert not hub.readable("ada", "ada/public").private


def test_branches_and_pull_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    hub.create("ada/new")
    hub.create("bob/theirs")
    heads = [hub.head("ada/new"), hub.head("bob/theirs")]
    result = push(folder, "ada/new", revision="v1/x", commit_message="Mine")
    assert result.url == f"{hub.endpoint}/ada/new/tree/v1%2Fx" and result.revision == "v1/x"
    assert hub.commits("ada/new", "v1/x") == ["Mine", "initial commit"]
    assert "model.onnx" in hub.files("ada/new", "v1/x") and not push(folder, "ada/new", revision="v1/x").changed

    for number, repo in enumerate(["ada/new", "bob/theirs"]):
        result = push(folder, repo, create_pr=True)
        assert result.pr_url == result.url == f"{hub.endpoint}/{repo}/discussions/1" and result.changed
        assert "model.onnx" in hub.files(repo, "refs/pr/1") and "model.onnx" not in hub.files(repo)
        assert hub.head(repo) == heads[number]
    push(folder, "ada/new", revision="refs/pr/1", commit_message="More")
    (folder / "genai_config.json").write_text('{"more": 1}')
    push(folder, "ada/new", revision="refs/pr/1", commit_message="More")
    assert hub.commits("ada/new", "refs/pr/1")[0] == "More" and hub.head("ada/new") == heads[0]
    with pytest.raises(FossilExportError, match="no such revision"):
        push(folder, "ada/new", revision="none", create_pr=True)
    # A pull request that would change nothing is none.
    result = push(folder, "ada/new", revision="refs/pr/1", create_pr=False)
    assert not result.changed and result.pr_url is None


def test_weights_of_an_earlier_model_go_in_the_same_commit(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    old = ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json"]
    kept = ["training_args.bin", "sub/model.safetensors", "vae.gguf", "notes.txt"]
    hosted.create("ada/new")
    hosted.commit("ada/new", dict.fromkeys([*old, *kept], b"old"))
    result = push(folder, "ada/new")
    assert set(result.removed) == set(old) and not set(old) & set(hosted.files("ada/new"))
    assert set(kept) <= set(hosted.files("ada/new")) and len(hosted.commits("ada/new")) == 3
    (said,) = [line for line in result.warnings if "earlier model" in line]
    assert all(name in said for name in old) and push(folder, "ada/new").removed == ()


def test_adapters_of_an_earlier_push_go_too(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """PEFT takes .safetensors before .bin, and a record is of the files that it came with."""
    push(convert("ada/adapter", tmp_path / "lora", to="lora").output, "ada/new")
    folder = made("miss", hosted, models, tmp_path / "miss")
    state = load_file(folder / "adapter_model.safetensors")
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    result = push(folder, "ada/new")
    assert set(result.removed) == {"adapter_model.safetensors", "fossil_export.json"}
    assert set(published(hosted)) == {"README.md", "adapter_config.json", "adapter_model.bin"}


def test_a_model_does_not_replace_its_base(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    head = hosted.head("ada/base")
    hosted.commit("ada/base", {"a.txt": b"a"}, branch="v2")
    merged = merge("ada/adapter", tmp_path / "merged", base=f"ada/base@{head}").output
    for arguments in (
        ["push", merged, "ada/base"],
        ["push", merged, "ada/base", "--revision", "main"],
        ["merge", "ada/adapter", "--base", f"ada/base@{head}", "--push-to-hub", "ada/base", "--stream"],
        ["merge", "ada/adapter", "--base", "ada/base@v2", "--push-to-hub", "ada/base", "--stream", "--revision", "v2"],
    ):
        told = cli(*arguments, *(["--cache-dir", tmp_path / "cache"] if "--stream" in arguments else []), code=1)
        assert "ada/base: is the base itself, and the next merge would be on top of this one" in told.stderr
    assert hosted.head("ada/base") == head and hosted.commits("ada/base", "v2")[0] == "Change files"
    push(merged, "ada/base", revision="merged")
    push(merged, "ada/base", create_pr=True)
    assert hosted.head("ada/base") == head


def test_models_and_adapters_do_not_meet(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    merged, lora = (made(kind, hosted, models, tmp_path / kind) for kind in ("merged", "lora"))
    push(lora, "ada/lora")
    push(merged, "ada/merged")
    hosted.reset_log()
    for folder, repo, said in ((merged, "ada/lora", "holds an adapter"), (lora, "ada/merged", "holds a whole model")):
        head = hosted.head(repo)
        with pytest.raises(FossilExportError, match=f"{repo}: {said}.*choose another repository"):
            push(folder, repo)
        assert hosted.head(repo) == head
    assert not any(seen.method in ("PUT", "POST") for seen in hosted.log)
    file = made("gguf-file", hosted, models, tmp_path / "gguf")
    assert push(file, "ada/lora").changed


@pytest.mark.parametrize("name", ["a/b/c", "~x", "ada/x@main", "", "ada/", "-x", "a--b", "hf://ada/x", "ada/x.git"])
def test_bad_names_are_told_before_anything_happens(name: str, hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    for arguments in (
        ["push", folder, "--", name],
        ["merge", models / "adapter", "--base", models / "base", "-o", tmp_path / "out", f"--push-to-hub={name}"],
        ["merge", models / "adapter", "--base", models / "base", "--stream", "--dry-run", f"--push-to-hub={name}"],
    ):
        line = cli(*arguments, code=1).stderr
        assert line.startswith(f"error: {name}: is no name of a repository") and line.count("\n") == 1
        assert not name or line.count(name) == 1
    assert hub.log == [] and not (tmp_path / "out").exists()
