"""Where the loopback Hub is as strict as the Hub, driven by the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loopback_tools
import pytest
from conftest import ADA, BOB
from hub_tools import HTTPX
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers
from loopback import LoopbackHub
from loopback.attributes import GITATTRIBUTES, is_ignored, is_tracked, tracking
from loopback.routes.card import said_of
from loopback_tools import FILES, WEIGHTS, add, folder_of

hub = loopback_tools.hub
api = loopback_tools.api
source = loopback_tools.source


def ask(url: str) -> Any:
    return HTTPX.get(url, headers=build_hf_headers())


def test_lists_come_in_pages(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.page_size, hub.commits_a_page = 2, 3
    hub.commit(source, {f"folder/{number}.txt": b"text" for number in range(7)})
    for number in range(5):
        hub.commit(source, {"a.txt": b"%d" % number})
    hub.reset_log()
    names = [entry.path for entry in api.list_repo_tree(source, recursive=True)]
    assert set(names) == {*hub.files(source), "folder"} and len(names) == len(set(names)) == 13
    assert sum("/tree/" in seen.path for seen in hub.log) == 7
    assert len(api.list_repo_commits(source)) == len(hub.commits(source)) == 8
    assert sum("/commits/" in seen.path for seen in hub.log) == 3


def test_every_answer_tells_what_is_left(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.limiter.is_on = True
    hub.limiter.quotas["api"] = 2
    tree = f"{hub.endpoint}/api/models/{source}/tree/main"
    told = [ask(tree) for _ in range(3)]
    assert [one.status_code for one in told] == [200, 200, 429]
    assert [one.headers["RateLimit"].partition(";t=")[0] for one in told] == ['"api";r=1', '"api";r=0', '"api";r=0']
    assert told[0].headers["RateLimit-Policy"] == '"fixed window";"api";q=2;w=300'
    other = ask(f"{hub.endpoint}/{source}/resolve/main/config.json")
    assert other.headers["RateLimit"].startswith('"resolvers";r=4999;t=')
    assert "RateLimit" not in HTTPX.get(hub.signed("/cdn/" + "0" * 64)).headers
    with pytest.raises(hub_errors.HfHubHTTPError, match="Retry after"):
        api.model_info(source)


def test_small_files_of_open_repositories_are_redirected(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.create("ada/closed", private=True)
    hub.commit("ada/closed", FILES)
    hub.commit(source, {"empty.txt": b""})
    told = ask(f"{hub.endpoint}/{source}/resolve/main/config.json")
    assert told.status_code == 307 and told.headers["X-Repo-Commit"] == hub.head(source)
    assert told.headers["Location"].startswith(f"/api/resolve-cache/models/{source}/{hub.head(source)}/config.json?")
    for repo, name in ((source, "empty.txt"), ("ada/closed", "config.json")):
        assert ask(f"{hub.endpoint}/{repo}/resolve/main/{name}").status_code == 200
    for repo in (source, "ada/closed"):
        assert Path(api.hf_hub_download(repo, "config.json")).read_bytes() == FILES["config.json"]
    assert ask(f"{hub.endpoint}/api/resolve-cache/models/ada/closed/main/config.json").status_code == 401


def test_the_storage_host_speaks_as_s3(hub: LoopbackHub, source: str, api: HfApi) -> None:
    hub.incidents.clear()
    oid = hub.files(source)["model.safetensors"][1]
    put = hub.signed(f"/storage/{source}/{oid}/3/0")
    for answer, status, code in (
        (HTTPX.put(put, content=iter([b"abc"])), 501, "NotImplemented"),
        (HTTPX.get(hub.signed(f"/cdn/{oid}") + "0"), 403, "AccessDenied"),
        (HTTPX.get(hub.signed(f"/cdn/{'0' * 64}")), 404, "NoSuchKey"),
        (HTTPX.get(hub.signed(f"/cdn/{oid}"), headers={"Range": f"bytes={len(WEIGHTS)}-"}), 416, "InvalidRange"),
    ):
        assert answer.status_code == status and f"<Code>{code}</Code>" in answer.text
        assert answer.headers["Content-Type"] == "application/xml" and "X-Error-Message" not in answer.headers
    several = HTTPX.get(hub.signed(f"/cdn/{oid}"), headers={"Range": "bytes=0-3,10-12"})
    assert (several.status_code, several.content) == (200, WEIGHTS)
    assert HTTPX.get(hub.signed(f"/cdn/{oid}"), headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]
    hub.lifetime = -1.0
    late = HTTPX.get(hub.signed(f"/cdn/{oid}"))
    assert late.status_code == 403 and "Request has expired" in late.text


def test_gitattributes_decide_what_is_large(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.create("ada/new")
    files = {"a.gguf": b"text", "b.gguf": b"GGUF\0", "c d.txt": b"\0", "e.npz": b"text", "f.txt": b"text"}
    api.upload_folder(repo_id="ada/new", folder_path=folder_of(tmp_path / "folder", files))
    large = {entry.path for entry in api.list_repo_tree("ada/new") if getattr(entry, "lfs", None)}
    assert large == {"b.gguf", "c d.txt", "e.npz"}
    more = hub.read("ada/new", ".gitattributes").decode().removeprefix(GITATTRIBUTES.decode()).splitlines()
    assert [line.split()[0] for line in more] == ["b.gguf", "c[[:space:]]d.txt"]
    add(api, "ada/new", {".gitattributes": b"*.txt filter=lfs\nf.txt -filter\n"})
    add(api, "ada/new", {"f.txt": b"other", "g.txt": b"other"})
    large = {entry.path for entry in api.list_repo_tree("ada/new") if getattr(entry, "lfs", None)}
    assert "g.txt" in large and "f.txt" not in large
    assert is_tracked("sub/a.bin", GITATTRIBUTES) and is_tracked("saved_model/x/y", GITATTRIBUTES)
    assert (
        not is_tracked("a.bin.txt", GITATTRIBUTES) and tracking(b"", "a") == b"a filter=lfs diff=lfs merge=lfs -text\n"
    )
    assert is_ignored("a/b.txt", "a/\n") and not is_ignored("a.txt", "*.txt\n!a.txt") and is_ignored("x/y.log", "*.log")


def test_names_are_checked(hub: LoopbackHub, api: HfApi, source: str) -> None:
    headers = build_hf_headers()
    for name in ("a--b", "a..b", "-a", "a.", "a.git", "a" * 97, "a b"):
        told = HTTPX.post(f"{hub.endpoint}/api/repos/create", json={"name": name}, headers=headers)
        assert told.status_code == 400 and "Max length is 96" in told.json()["error"], name
    hub.create("ada/new")
    for branch in ("a b", "a..b", "-a", "a.lock", "a~1", "@", "a@{1}", "refs/heads/x", "0" * 40, ".a", "a/"):
        with pytest.raises(hub_errors.HfHubHTTPError, match="Invalid reference name"):
            api.create_branch("ada/new", branch=branch)
    for path in ("a//b", "a\\b", "a\n"):
        with pytest.raises(hub_errors.HfHubHTTPError, match="Invalid path"):
            add(api, "ada/new", {path: b"x"})
    assert set(hub.files("ada/new")) == {".gitattributes"}


def test_rights_are_those_of_token_and_organization(hub: LoopbackHub, api: HfApi) -> None:
    accounts = hub.accounts
    accounts.members["lab"] = {"ada": "write", "bob": "read"}
    api.create_repo("lab/new", private=True)
    bob = HfApi(token=BOB)
    assert bob.model_info("lab/new").private and {org["name"]: org["roleInOrg"] for org in bob.whoami()["orgs"]} == {
        "lab": "read"
    }
    for refused in (lambda: bob.create_repo("lab/other"), lambda: add(bob, "lab/new", {"a.txt": b"a"})):
        with pytest.raises(hub_errors.HfHubHTTPError) as forbidden:
            refused()
        assert forbidden.value.response.status_code == 403
    accounts.roles[ADA] = "read"
    assert api.whoami()["auth"]["accessToken"]["role"] == "read"
    for write in (lambda: add(api, "lab/new", {"a.txt": b"a"}, create_pr=True), lambda: api.create_repo("ada/mine")):
        with pytest.raises(hub_errors.HfHubHTTPError, match="403"):
            write()
    api.auth_check("lab/new")
    with pytest.raises(hub_errors.HfHubHTTPError, match="403"):
        api.auth_check("lab/new", write=True)
    accounts.roles[ADA], accounts.scopes[ADA] = "fineGrained", ["lab/new"]
    add(api, "lab/new", {"a.txt": b"a"})
    with pytest.raises(hub_errors.HfHubHTTPError, match="403"):
        api.create_repo("ada/mine")


@pytest.mark.parametrize(
    "metadata, said",
    [
        ("license: nobodys", '"license" must be one of [apache-2.0, mit,'),
        ("license: [mit, nobodys]", '"license" must be one of'),
        ("tags: [1]", '"tags[0]" must be a string'),
        ("base_model: a b", '"base_model[0]" with value "a b" is not valid'),
        ("base_model_relation: cousin", '"base_model_relation" must be one of [adapter,'),
        ("pipeline_tag: [a]", '"pipeline_tag" must be a string'),
    ],
)
def test_a_card_must_fit_its_schema(metadata: str, said: str, hub: LoopbackHub, api: HfApi) -> None:
    card = f"---\n{metadata}\n---\n"
    assert said_of("---\nlicense: other\nlanguage: en\nbase_model: [a/b, c/d]\n---\n") == ([], [])
    (error,) = said_of(card)[0]
    assert error.startswith(said)
    hub.create("ada/new")
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        add(api, "ada/new", {"README.md": card.encode()})
    assert set(hub.files("ada/new")) == {".gitattributes"}
