"""The loopback Hub, driven by the real client: what other tests rely on it for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loopback_tools
import pytest
from conftest import ADA
from hub_tools import HTTPX
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub import errors as hub_errors
from loopback import Fault, LoopbackHub, environment
from loopback_tools import FILES, WEIGHTS, add, folder_of, read_range

hub = loopback_tools.hub
api = loopback_tools.api
source = loopback_tools.source


def test_round_trip(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    files = FILES | {"onnx/model.onnx": b"onnx", "onnx/tokenizer.json": b"{" * ((10 << 20) + 1), "empty.bin": b""}
    folder = folder_of(tmp_path / "folder", files)
    for _ in range(2):
        assert api.create_repo("ada/new", private=True, exist_ok=True).repo_id == "ada/new"
    api.upload_folder(repo_id="ada/new", folder_path=folder)
    assert {path: hub.read("ada/new", path) for path in files} == files
    assert hub.commits("ada/new") == ["Upload folder using huggingface_hub", "initial commit"]

    copy = Path(api.snapshot_download("ada/new"))
    assert {path: (copy / path).read_bytes() for path in files} == files
    info = api.model_info("ada/new", files_metadata=True)
    assert info.sha == hub.head("ada/new") and info.private and info.card_data and info.card_data.license == "mit"
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    assert sizes == {path: size for path, (size, _) in hub.files("ada/new").items()}
    tree = {entry.path: entry for entry in api.list_repo_tree("ada/new", recursive=True, expand=True)}
    assert tree["onnx/tokenizer.json"].lfs.sha256 == hub.files("ada/new")["onnx/tokenizer.json"][1]
    assert tree["config.json"].lfs is None and tree["config.json"].last_commit.oid == info.sha
    assert [entry.path for entry in api.list_repo_tree("ada/new", "onnx")] == ["onnx/model.onnx", "onnx/tokenizer.json"]
    assert hub.read("ada/new", ".gitattributes").endswith(b"onnx/tokenizer.json filter=lfs diff=lfs merge=lfs -text\n")
    assert api.whoami()["name"] == "ada"
    assert api.list_repo_commits("ada/new")[0].title == "Upload folder using huggingface_hub"


def test_unchanged_files_are_not_committed_again(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.create("ada/new")
    first = add(api, "ada/new", FILES)
    hub.reset_log()
    assert add(api, "ada/new", FILES) == first == hub.head("ada/new")
    assert hub.moved()[1] < 10_000


def test_range_of_an_lfs_file(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.reset_log()
    assert read_range(source, "model.safetensors", 1000, 2999) == WEIGHTS[1000:3000]
    assert read_range(source, "config.json", 2, 100) == FILES["config.json"][2:]
    assert hub.moved()[0] < 5000
    assert [(request.has_token, request.status) for request in hub.log] == [
        (True, 302),
        (False, 206),
        (True, 307),
        (True, 206),
    ]
    with pytest.raises(hub_errors.HfHubHTTPError) as refused:
        read_range(source, "model.safetensors", len(WEIGHTS), len(WEIGHTS) + 5)
    assert refused.value.response.status_code == 416


def test_multipart_upload(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("ada/new")
    large = os.urandom(9_000_001)
    hub.fault(Fault("PUT", r"/storage/.*/2$", cut_after=100_000))
    hub.fault(Fault("POST", "complete_multipart", lost=True))
    add(api, "ada/new", {"model.safetensors": large})
    assert hub.read("ada/new", "model.safetensors") == large
    assert sum(request.method == "PUT" for request in hub.log) == 4


def test_copies_move_nothing(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.create("ada/new")
    copies = [CommitOperationCopy("model.safetensors", "a.safetensors", src_repo_id=source, src_repo_type="model")]
    hub.reset_log()
    api.create_commit("ada/new", copies, commit_message="Copy")
    assert hub.read("ada/new", "a.safetensors") == WEIGHTS
    assert sum(hub.moved()) < 5000

    hub.create("ada/other")
    hub.refuse_copies = True
    copies = [CommitOperationCopy("model.safetensors", "a.safetensors", src_repo_id=source, src_repo_type="model")]
    with pytest.raises(hub_errors.FileDuplicationError):
        api.create_commit("ada/other", copies, commit_message="Copy")
    hub.refuse_copies, hub.no_xet = False, True
    with pytest.raises(ValueError, match="no xet hash"):
        api.create_commit("ada/other", copies, commit_message="Copy")
    hub.no_xet = False
    hub.fault(Fault("POST", "lfs-files/duplicate", status=403, headers={"X-Error-Message": "not yours"}))
    with pytest.raises(hub_errors.HfHubHTTPError, match="not yours"):
        api.create_commit("ada/other", copies, commit_message="Copy")
    assert hub.commits("ada/other") == ["initial commit"]


def test_objects_belong_to_one_repository(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.create("ada/new")
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation._upload_mode, operation._is_uploaded = "lfs", True  # claim what is not so
    with pytest.raises(hub_errors.BadRequestError, match="was not uploaded"):
        api.create_commit("ada/new", [operation], commit_message="Add")
    assert set(hub.files("ada/new")) == {".gitattributes"}


def test_pull_request_and_branch(hub: LoopbackHub, api: HfApi, source: str) -> None:
    before = hub.head(source)
    made = api.create_commit(
        source, [CommitOperationAdd("a.bin", b"abc")], commit_message="Propose", create_pr=True, parent_commit=before
    )
    assert made.pr_num == 1 and made.pr_revision == "refs/pr/1"
    assert hub.head(source) == before and hub.read(source, "a.bin", "refs/pr/1") == b"abc"
    assert [(pull.num, pull.title) for pull in api.get_repo_discussions(source)] == [(1, "Propose")]
    assert [ref.ref for ref in api.list_repo_refs(source, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    assert Path(api.hf_hub_download(source, "a.bin", revision="refs/pr/1")).read_bytes() == b"abc"

    hub.create("ada/new")
    for _ in range(2):
        api.create_branch("ada/new", branch="v1/x", exist_ok=True)
    with pytest.raises(hub_errors.HfHubHTTPError, match="409"):
        api.create_branch("ada/new", branch="v1/x")
    add(api, "ada/new", {"a.txt": b"a"}, revision="v1/x")
    assert "a.txt" in hub.files("ada/new", "v1/x") and "a.txt" not in hub.files("ada/new")


def test_parent_commit_and_deletions(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("ada/new")
    first = add(api, "ada/new", {"a.txt": b"a", "b/c.txt": b"c"})
    hub.fault(Fault("POST", "/commit/", before=lambda: hub.commit("ada/new", {"other.txt": b"o"})))
    with pytest.raises(hub_errors.HfHubHTTPError, match="A commit has happened since") as raised:
        add(api, "ada/new", {"a.txt": b"mine"}, parent_commit=first)
    assert raised.value.response.status_code == 412 and hub.read("ada/new", "a.txt") == b"a"
    deletions = [CommitOperationDelete("a.txt"), CommitOperationDelete("b/")]
    api.create_commit("ada/new", deletions, commit_message="Delete", parent_commit=hub.head("ada/new"))
    assert set(hub.files("ada/new")) == {".gitattributes", "other.txt"}
    with pytest.raises(hub_errors.EntryNotFoundError):
        api.create_commit("ada/new", [CommitOperationDelete("no.txt")], commit_message="Delete")


def test_refusals_are_the_right_exceptions(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.create("bob/secret", private=True)
    hub.create("bob/gated", gated=True)
    hub.commit("bob/gated", FILES)
    anonymous, wrong = HfApi(token=False), HfApi(token="hf_wrong")
    for caller, repo_id, status in [(api, "bob/none", 404), (api, "bob/secret", 404), (anonymous, "bob/secret", 401)]:
        with pytest.raises(hub_errors.RepositoryNotFoundError) as missing:
            caller.model_info(repo_id)
        assert missing.value.response.status_code == status
    with pytest.raises(hub_errors.HfHubHTTPError, match="Invalid credentials") as invalid:
        wrong.model_info(source)
    assert type(invalid.value) is hub_errors.HfHubHTTPError and invalid.value.response.status_code == 401

    assert api.model_info("bob/gated").gated == "auto"
    for caller, status in [(api, 403), (anonymous, 401)]:
        with pytest.raises(hub_errors.GatedRepoError) as gated:
            caller.hf_hub_download("bob/gated", "config.json")
        assert gated.value.response.status_code == status
    hub.granted.add("ada")
    assert Path(api.hf_hub_download("bob/gated", "config.json")).read_bytes() == FILES["config.json"]

    with pytest.raises(hub_errors.RevisionNotFoundError):
        api.hf_hub_download(source, "config.json", revision="none")
    with pytest.raises(hub_errors.RevisionNotFoundError):
        add(api, source, {"a.txt": b"a"}, revision="none", create_pr=True)
    with pytest.raises(hub_errors.EntryNotFoundError):
        api.hf_hub_download(source, "none.json")
    for refused in (lambda: add(api, source, {"a.txt": b"a"}), lambda: api.create_repo("bob/new")):
        with pytest.raises(hub_errors.HfHubHTTPError) as forbidden:
            refused()
        assert forbidden.value.response.status_code == 403
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        add(anonymous, source, {"a.txt": b"a"})
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        add(api, source, {"README.md": b"---\na: [\n---\n"})


def test_the_storage_host_takes_no_token(hub: LoopbackHub, api: HfApi, source: str) -> None:
    oid = hub.files(source)["model.safetensors"][1]
    answer = HTTPX.get(hub.signed(f"/cdn/{oid}"), headers={"Authorization": f"Bearer {ADA}"})
    assert answer.status_code == 400 and len(hub.incidents) == 1
    hub.incidents.clear()
    assert HTTPX.get(hub.signed(f"/cdn/{oid}").split("?")[0]).status_code == 403


def test_a_child_process(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    script = f"import huggingface_hub; print(huggingface_hub.hf_hub_download({source!r}, 'model.safetensors'))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS
    assert str(tmp_path) in done.stdout and not any(request.has_token for request in hub.log)
