"""Hubs that others wrote, and hosts beside the Hub: what they do otherwise is no refusal of the Hub's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_tools import HTTPX, cli
from loopback import Fault, LoopbackHub
from push_tools import made

from fossil_export import FossilExportError, merge, push
from fossil_export.errors import HubError
from fossil_export.storage import parse_name
from fossil_export.storage.hub._errors import explained, is_transient


@pytest.mark.parametrize("status", [None, 404, 405, 501])
def test_a_hub_that_has_no_auth_check(status: int | None, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    if status is None:
        hosted.has_auth_check = False
    else:
        hosted.fault(Fault("GET", "/auth-check", status=status, times=None))
    folder = made("merged", hosted, models, tmp_path / "artifact")
    hosted.create("ada/new")
    assert push(folder, "ada/new").changed
    (folder / "LICENSE").write_text("other words")
    assert push(folder, "ada/new").changed and not push(folder, "ada/new").changed
    hosted.create("bob/theirs")
    with pytest.raises(HubError, match=r"bob/theirs: .*: your token may not do that"):  # by the next request
        push(folder, "bob/theirs")


def test_what_the_branch_holds_already_is_not_ignored(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """Another Hub says shouldIgnore of it."""
    folder = made("merged", hosted, models, tmp_path / "artifact")
    push(folder, "ada/new")
    hosted.ignores_unchanged = True
    assert not push(folder, "ada/new").changed
    (folder / "LICENSE").write_text("other words, and more of them")
    assert push(folder, "ada/new").changed
    assert hosted.read("ada/new", "LICENSE") == b"other words, and more of them"


def test_a_gitignore_refuses_what_is_new_or_changed(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    push(folder, "ada/new")
    hosted.commit("ada/new", {".gitignore": b"# mine\n*.jinja\nLICENSE\n"})
    assert not push(folder, "ada/new").changed
    (folder / "LICENSE").write_text("other words")
    with pytest.raises(FossilExportError, match=r"ada/new: its \.gitignore leaves out LICENSE; change it"):
        push(folder, "ada/new")
    hosted.create("ada/other")
    hosted.commit("ada/other", {".gitignore": b"*.safetensors\n"})
    with pytest.raises(FossilExportError, match=r"ada/other: its .gitignore leaves out model-00001-of-00003.safetens"):
        push(folder, "ada/other")


STORAGE = (
    "the storage host localhost refuses this (status 403, AccessDenied), not the Hub itself; check this machine's "
    "clock and HTTPS_PROXY, and run the same command again"
)


def test_the_storage_host_does_not_speak_of_tokens(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = merge(models / "adapter", tmp_path / "merged", base=models / "base").output
    hosted.lifetime = -1.0  # as long ago as a clock may be wrong
    told = cli("merge", "ada/adapter", "-o", tmp_path / "out", code=1).stderr
    assert told == f"error: ada/adapter: {STORAGE}\n"
    told = cli("push", folder, "ada/new", code=1).stderr
    assert told.startswith("error: ada/new: uploading ") and "token" not in told
    assert "the storage host localhost refuses this (status 403" in told and told.count("\n") == 1


def test_an_address_that_became_too_old_is_asked_for_again(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    def renew() -> None:
        hosted.lifetime = 3600.0

    for method, path in (("GET", "^/cdn/"), ("PUT", "^/storage/")):
        hosted.lifetime = -1.0
        hosted.fault(fault := Fault(method, path, after=renew))
        if method == "GET":
            merge("ada/adapter", tmp_path / "out")
        else:
            push(tmp_path / "out", "ada/new")
        assert fault.times == 0


def test_a_page_of_a_proxy_does_not_speak_of_tokens(hosted: LoopbackHub, tmp_path: Path) -> None:
    page = {"Content-Type": "text/html; charset=utf-8"}
    hosted.fault(Fault("GET", "^/api/models/", status=403, headers=page, times=None))
    told = cli("inspect", "ada/adapter", code=1).stderr
    assert told == (
        f"error: ada/adapter: {hosted.endpoint} is refused (status 403) by a page that is not the Hub's; check "
        "HTTPS_PROXY and HF_ENDPOINT, and run the same command again\n"
    )


WITHOUT = "or with HF_HUB_DISABLE_XET=1 to go without hf_xet"


@pytest.mark.parametrize("status", [404, 405, 501])
@pytest.mark.parametrize("right", ["read", "write"])
def test_a_hub_without_xet_gets_the_hint(status: int, right: str, hub: LoopbackHub) -> None:
    """One that announced it, which has no way to it."""
    from huggingface_hub.utils import hf_raise_for_status

    url = f"{hub.endpoint}/api/models/ada/base/xet-{right}-token/main"
    answer = HTTPX.Response(status, headers={"X-Error-Code": "RepoNotFound"}, request=HTTPX.Request("GET", url))
    with pytest.raises(Exception) as raised:
        hf_raise_for_status(answer)
    told = str(explained(raised.value, "ada/base"))
    assert (
        told
        == f"ada/base: the Hub shows no way to its Xet storage (status {status}); run the same command again, {WITHOUT}"
    )


@pytest.mark.parametrize(
    "problem, said",
    [
        (RuntimeError("Network error: error sending request for url (https://cas.example/x)"), "cannot be reached ("),
        (
            RuntimeError("Server error: HTTP status server error (503 Service Unavailable) for url"),
            "has trouble of its",
        ),
        (
            RuntimeError("Task error: HTTP status client error (403 Forbidden) for url"),
            "refuses this (status 403)",
        ),
    ],
)
def test_xet_is_called_by_its_name(problem: Exception, said: str, hub: LoopbackHub) -> None:
    told = str(explained(problem, "ada/base"))
    assert told.startswith(f"ada/base: the Xet storage {said}") and told.endswith(WITHOUT)
    assert is_transient(problem) and "token" not in told and hub.endpoint not in told


def test_links_follow_the_endpoint(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    hosted.commit(
        "ada/base", {"README.md": b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# B\n"}
    )
    result = push(merge("ada/adapter", tmp_path / "merged").output, "ada/new")
    card = hosted.read("ada/new", "README.md").decode()
    assert f"license_link: {hosted.endpoint}/ada/base/blob/main/LICENSE" in card
    assert f"[ada/base]({hosted.endpoint}/ada/base/tree/" in card and "huggingface.co" not in card
    assert result.url.startswith(hosted.endpoint)
    found = parse_name("hf://ada/base/sub")
    assert found is not None and found.page == f"{hosted.endpoint}/ada/base"


def test_a_card_that_the_hub_refuses_is_told_before_anything_is_sent(
    hosted: LoopbackHub, models: Path, tmp_path: Path
) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    (folder / "README.md").write_text("---\nlicense: my-own\n---\n# Mine\n")
    told = cli("push", folder, "ada/new", code=1).stderr
    assert 'the Hub refuses README.md\'s metadata: "license" must be one of [apache-2.0, mit,' in told
    assert not [seen for seen in hosted.log if seen.method == "PUT"]
