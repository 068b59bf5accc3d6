"""Models and adapters by their names on the Hub, read over HTTP by the real client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ADA, NOISE, make_adapter, make_base, weights
from hub_tools import cli, content, fetched, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import Fault, LoopbackHub, environment, point_client_at
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, inspect, load_adapter, merge, plan_merge, verify
from fossil_export.errors import AdapterError, CheckpointError
from fossil_export.merging.api import run_plan
from fossil_export.storage import Origin, fetch, find_origin, pinned
from fossil_export.storage.hub.names import is_hub_id, is_on_hub, repository_of


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

    needed = {*here, "adapter_config.json", "adapter_model.safetensors"}
    assert fetched(hosted) == needed and not needed & set(NOISE)
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
    wanted = merge("ada/adapter", tmp_path / "merged")

    hosted.commit("ada/adapter", {}, delete=["adapter_model.safetensors"])
    hosted.reset_log()
    result = merge("ada/adapter", tmp_path / "pickled")
    assert fetched(hosted) == {"adapter_config.json", "adapter_model.bin"} and len(result.plan.adapter.pickled) == len(
        state
    )
    assert result.survival == wanted.survival
    assert all(torch.equal(v, weights(tmp_path / "merged")[k]) for k, v in weights(tmp_path / "pickled").items())


def test_revisions(hosted: LoopbackHub, models: Path) -> None:
    first = hosted.head("ada/adapter")
    small = {path.name: path for path in (models / "adapter" / "checkpoint-100").iterdir()}
    branch = hosted.commit("ada/adapter", small, branch="v2")
    pull = hosted.commit("ada/adapter", small, branch="refs/pr/1")
    last = hosted.commit("ada/adapter", {"README.md": b"---\n---\n"})

    def found(name: str) -> tuple[str | None, int, str]:
        adapter = load_adapter(name)
        return adapter.revision, adapter.rank, adapter.name

    assert found("ada/adapter") == (last, 8, "ada/adapter")
    assert found(f"ada/adapter@{first}") == found(f"ada/adapter@{first[:8]}") == (first, 8, "ada/adapter")
    assert found("ada/adapter@v2") == found("hf://ada/adapter@v2") == (branch, 4, "ada/adapter")
    assert found("ada/adapter@refs/pr/1") == found("hf://ada/adapter@refs/pr/1") == (pull, 4, "ada/adapter")
    inside = "hf://ada/adapter/checkpoint-100"
    assert found(inside) == found(f"{inside}/") == (last, 4, inside)
    assert found(f"{inside}/adapter_model.safetensors") == (last, 4, f"{inside}/adapter_model.safetensors")
    assert found(f"{inside}/adapter_config.json") == (last, 4, f"{inside}/adapter_config.json")
    assert found(f"hf://ada/adapter@{first}/checkpoint-100")[:2] == (first, 4)
    page = f"{hosted.endpoint}/ada/adapter"
    assert found(page) == (last, 8, "ada/adapter")
    assert found(f"{page}/tree/v2") == (branch, 4, "ada/adapter")
    assert found(f"{page}/tree/{first}/checkpoint-100") == (first, 4, inside)
    assert found(f"{page}/blob/main/checkpoint-100/adapter_model.safetensors")[1:] == (
        4,
        f"{inside}/adapter_model.safetensors",
    )


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


def test_the_adapter_pins_its_base(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    first = hosted.head("ada/base")
    hosted.commit("ada/base", {"config.json": b"{}"}, delete=["model.safetensors.index.json"])
    config = json.loads((models / "adapter" / "adapter_config.json").read_text()) | {"revision": first}
    hosted.commit("ada/adapter", {"adapter_config.json": json.dumps(config).encode()})
    merge("ada/adapter", tmp_path / "merged")
    assert record(tmp_path / "merged")["base"]["revision"] == first
    with pytest.raises(FossilExportError, match="index"):
        merge("ada/adapter", tmp_path / "other", base="ada/base")


@pytest.mark.parametrize("when", ["between plan and run", "in the middle of the download"])
def test_a_branch_that_moves_is_not_followed(hosted: LoopbackHub, models: Path, tmp_path: Path, when: str) -> None:
    merge(models / "adapter", tmp_path / "here", base=models / "base")
    first = hosted.head("ada/base")

    def move() -> None:
        files = {name: b"other" for name in hosted.files("ada/base") if name.endswith((".safetensors", ".json"))}
        hosted.commit("ada/base", files)

    if when.startswith("between"):
        plan = plan_merge("ada/adapter")
        move()
        run_plan(plan, tmp_path / "merged")
    else:
        hosted.fault(fault := Fault("HEAD", r"/ada/base/resolve/.*\.safetensors", before=move))
        merge("ada/adapter", tmp_path / "merged")
        assert fault.times == 0
    assert weights(tmp_path / "here").keys() == weights(tmp_path / "merged").keys()
    for name in (path.name for path in (tmp_path / "here").glob("*.safetensors")):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert record(tmp_path / "merged")["base"]["revision"] == first != hosted.head("ada/base")


def test_a_path_that_exists_wins_and_says_so(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "ada")
    monkeypatch.chdir(tmp_path)
    adapter, base = (
        f"warning: ada/{name}: the {what} in this folder is taken, not the Hub's; write hf://ada/{name} for that one"
        for name, what in (("adapter", "adapter"), ("base", "base model"))
    )
    for command in (
        ["inspect", "ada/adapter"],
        ["merge", "ada/adapter", "-o", "merged"],
        ["merge", "ada/adapter", "--dry-run"],
        ["convert", "ada/adapter", "--to", "lora", "-o", "lora"],
    ):
        assert cli(*command).stderr.splitlines()[:2] == [adapter, base]
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
    assert seen == known | {"modules": [module | {"norm": None} for module in known["modules"]]}
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
    here, there = plan_merge(tmp_path / "adapter", base), plan_merge(tmp_path / "adapter", "ada/tied")
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert here.tensors[0].source.path != there.tensors[0].source.path
    assert here.config == there.config and here.config_edits == there.config_edits
    assert here.config_edits.get("tie_word_embeddings", True) is not trained
    assert {t.name: (t.action, t.shape) for t in here.tensors} == {t.name: (t.action, t.shape) for t in there.tensors}


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


def test_json_is_one_object(hosted: LoopbackHub, tmp_path: Path) -> None:
    seen = json.loads(cli("inspect", "ada/adapter", "--json").stdout)
    assert (seen["adapter"], seen["revision"]) == ("ada/adapter", hosted.head("ada/adapter"))
    assert len(seen["base_tensors"]) == 14
    command = [sys.executable, "-m", "fossil_export", "merge", "ada/adapter", "-o", str(tmp_path / "m"), "--json"]
    ran = subprocess.run(command, env=environment(hosted, tmp_path / "h"), capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["plan"]["base"]["revision"] == hosted.head("ada/base")
    assert ran.stderr == ""


@pytest.fixture(scope="module")
def empty_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("empty")
    with LoopbackHub(folder / "storage") as hub, pytest.MonkeyPatch.context() as patch:
        point_client_at(patch, hub, folder / "home")
        patch.setattr("fossil_export.storage.hub.errors.PAUSE", 0.0)
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


def test_records_are_pinned() -> None:
    commit = "0" * 40
    assert pinned("ada/base", commit) == f"ada/base@{commit}"
    assert pinned("hf://ada/base/a@b/c", commit) == f"hf://ada/base@{commit}/a@b/c"
    assert (
        pinned("ada/base@v1", commit) == "ada/base@v1" and pinned("hf://ada/base@v1/x", commit) == "hf://ada/base@v1/x"
    )
    assert pinned("/models/base", commit) == "/models/base" and pinned("ada/base", None) == "ada/base"
    assert repository_of("hf://ada/base/a@b/c") == repository_of("ada/base@v1") == "ada/base"
