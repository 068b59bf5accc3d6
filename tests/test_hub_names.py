"""What a name means: a path here, a model on the Hub, or neither; and names that the Hub redirects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_tools import cli, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import Fault, LoopbackHub, point_client_at

from fossil_export import FossilExportError, load_adapter, merge, plan_merge
from fossil_export.errors import AdapterError, CheckpointError
from fossil_export.storage import Origin, find_origin, pinned
from fossil_export.storage.hub._names import is_hub_id, is_on_hub, repository_of


def test_a_path_that_exists_wins_and_says_so(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "ada")
    monkeypatch.chdir(tmp_path)
    base = "warning: ada/base: the base model in this folder is taken, not the Hub's; write hf://ada/base for that one"
    for command in (
        ["inspect", "ada/adapter"],
        ["merge", "ada/adapter", "-o", "merged"],
        ["merge", "ada/adapter", "--dry-run"],
        ["convert", "ada/adapter", "--to", "lora", "-o", "lora"],
    ):
        assert cli(*command).stderr.splitlines()[:1] == [base]  # and none for what is clearly an adapter
    # The record does not read as ids, so that there is nothing to choose.
    assert cli("verify", "merged", "--level", "weights").stderr == ""
    assert record(tmp_path / "merged")["base"]["name"] == "./ada/base"
    assert record(tmp_path / "merged")["base"]["revision"] is None and hosted.log == []

    told = cli("merge", "hf://ada/adapter", "--base", "hf://ada/base", "-o", "remote").stderr
    assert told == "" and record(tmp_path / "remote")["base"]["revision"] == hosted.head("ada/base")
    shutil.rmtree(tmp_path / "ada")
    with pytest.raises(AdapterError, match=r"ada/adapter: no such file or folder; download the adapter and name"):
        load_adapter(Path("ada/adapter"))
    with pytest.raises(CheckpointError, match="ada/base: no such file or folder"):
        plan_merge("ada/adapter", Path("ada/base"))
    with pytest.raises(AdapterError, match="no such file or folder"):
        load_adapter("./ada/adapter")


def test_a_folder_of_that_name_changes_nothing_of_what_was_made(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for where somebody types the name, not where a record has it."""
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
    for name in ("adapter", "base"):
        shutil.copytree(models / "adapter" / "checkpoint-100", tmp_path / "ada" / name)
        (tmp_path / "ada" / name / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    monkeypatch.chdir(tmp_path)
    cli("merge", "hf://ada/adapter", "--base", "hf://ada/base", "-o", "merged")
    assert "parity" in cli("verify", "merged", "--level", "weights").stdout
    cli("push", "merged", "ada/pushed")
    cli("merge", "hf://ada/adapter", "--base", "hf://ada/base", "--push-to-hub", "ada/streamed", "--stream",
        "--cache-dir", "cache")  # fmt: skip
    for repo in ("ada/pushed", "ada/streamed"):
        card = hosted.read(repo, "README.md").decode()
        assert "base_model: ada/base\n" in card and "license: mit\n" in card and "ada/adapter/tree/" in card
        published = json.loads(hosted.read(repo, "fossil_export.json"))
        assert (published["base"]["name"], published["adapter"]["name"]) == ("ada/base", "ada/adapter")
        cli("verify", repo, "--level", "weights", "--push-to-hub")
    assert published["base"]["revision"] == hosted.head("ada/base")


def test_the_oldest_models_have_no_owner(hosted: LoopbackHub, tmp_path: Path) -> None:
    """The Hub sends their names on, to where an owner has them now."""
    hosted.fault(Fault("GET", "^/api/models/base$", status=307, headers={"Location": "/api/models/ada/base"}))
    merge("ada/adapter", tmp_path / "merged", base="base")
    found = record(tmp_path / "merged")["base"]
    assert (found["name"], found["revision"]) == ("ada/base", hosted.head("ada/base"))
    assert "parity" in cli("verify", tmp_path / "merged", "--level", "weights").stdout


def test_a_renamed_model_is_called_by_its_new_name(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """The Hub redirects from the old one; what is recorded and published must not depend on that for ever."""
    hosted.renamed = {"ada/old": "ada/base", "ada/former": "ada/adapter", "ada/typo": "ada/model"}
    told = cli("merge", "ada/former", "--base", "ada/old", "-o", tmp_path / "merged").stderr
    assert told.splitlines() == [
        "warning: ada/former: is called ada/adapter on the Hub, and is recorded as that",
        "warning: ada/old: is called ada/base on the Hub, and is recorded as that",
    ]
    found = record(tmp_path / "merged")
    assert (found["base"]["name"], found["adapter"]["name"]) == ("ada/base", "ada/adapter")
    told = cli(
        "merge", "ada/adapter", "--push-to-hub", "ada/old", "--stream", "--cache-dir", tmp_path / "c", code=1
    ).stderr
    assert "ada/base: is the base itself" in told
    hosted.create("ada/model")
    told = cli("push", tmp_path / "merged", "ada/typo").stdout
    assert f"published  {hosted.endpoint}/ada/model\n" in told
    assert "base_model: ada/base\n" in hosted.read("ada/model", "README.md").decode()


@pytest.fixture(scope="module")
def empty_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("empty")
    with LoopbackHub(folder / "storage") as hub, pytest.MonkeyPatch.context() as patch:
        point_client_at(patch, hub, folder / "home")
        patch.setattr("fossil_export.storage.hub._errors.PAUSE", 0.0)
        patch.chdir(folder)
        yield hub
        assert hub.incidents == []


ODD = st.text(st.sampled_from("abAB0/@.-_~ :%?#\\\0\n\u00e9\udc80\ud800*[]{}"), max_size=12) | st.text(max_size=12)
NAMES = st.one_of(
    ODD,
    st.tuples(st.sampled_from(["hf://", "https://", "http://127.0.0.1/", "hf://ada/base", "ada/base@", "~"]), ODD).map(
        "".join
    ),
    st.tuples(ODD, ODD).map("/".join),
)


@given(name=NAMES, revision=st.none() | ODD)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_names(empty_hub: LoopbackHub, name: str, revision: str | None) -> None:
    if is_hub_id(name):
        user, _, rest = name.partition("/")
        assert repository_of(name) == f"{user}/{rest.partition('@')[0]}"
    again = pinned(name, revision)
    assert again == name or (revision is not None and revision in again and is_on_hub(name))
    assert pinned(again, revision) == again or not revision
    for what, error in (("adapter", AdapterError), ("base model", CheckpointError)):
        try:
            found = find_origin(name, error, what)
        except FossilExportError as problem:
            assert "\n" not in str(problem) or "\n" in name
            str(problem).encode()
        else:
            assert isinstance(found, Origin) and found.is_path and found.path.exists()
