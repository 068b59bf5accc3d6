"""Revisions: the commit that was read is the one that is recorded and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import edit_json, weights
from hub_tools import record
from loopback import Fault, LoopbackHub

from fossil_export import FossilExportError, load_adapter, merge, plan_merge
from fossil_export.merging._merge import run_merge
from fossil_export.storage import pinned
from fossil_export.storage.hub._names import repository_of


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


def test_the_adapter_pins_its_base(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    first = hosted.head("ada/base")
    hosted.commit("ada/base", {"config.json": b"{}"}, delete=["model.safetensors.index.json"])
    config = json.loads((models / "adapter" / "adapter_config.json").read_text()) | {"revision": first}
    hosted.commit("ada/adapter", {"adapter_config.json": json.dumps(config).encode()})
    merge("ada/adapter", tmp_path / "merged")
    assert record(tmp_path / "merged")["base"]["revision"] == first
    with pytest.raises(FossilExportError, match="index"):
        merge("ada/adapter", tmp_path / "other", base="ada/base")


@pytest.mark.parametrize("order", [1, -1])
def test_the_only_revision_that_adapters_of_one_base_name_is_taken(
    order: int, hosted: LoopbackHub, models: Path, tmp_path: Path
) -> None:
    first = hosted.head("ada/base")
    hosted.commit("ada/base", {"config.json": b"{}"}, delete=["model.safetensors.index.json"])
    for name, revision in (("free", None), ("pinned", first)):
        shutil.copytree(models / "adapter", tmp_path / name)
        edit_json(tmp_path / name / "adapter_config.json", revision=revision)
    plan = plan_merge([tmp_path / "free", tmp_path / "pinned"][::order])
    assert plan.to_dict()["base"]["revision"] == first


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
        run_merge(plan, tmp_path / "merged")
    else:
        hosted.fault(fault := Fault("HEAD", r"/ada/base/resolve/.*\.safetensors", before=move))
        merge("ada/adapter", tmp_path / "merged")
        assert fault.times == 0
    assert weights(tmp_path / "here").keys() == weights(tmp_path / "merged").keys()
    for name in (path.name for path in (tmp_path / "here").glob("*.safetensors")):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert record(tmp_path / "merged")["base"]["revision"] == first != hosted.head("ada/base")


def test_records_are_pinned() -> None:
    commit = "0" * 40
    assert pinned("ada/base", commit) == f"ada/base@{commit}"
    assert pinned("hf://ada/base/a@b/c", commit) == f"hf://ada/base@{commit}/a@b/c"
    assert (
        pinned("ada/base@v1", commit) == "ada/base@v1" and pinned("hf://ada/base@v1/x", commit) == "hf://ada/base@v1/x"
    )
    assert pinned("/models/base", commit) == "/models/base" and pinned("ada/base", None) == "ada/base"
    assert repository_of("hf://ada/base/a@b/c") == repository_of("ada/base@v1") == "ada/base"
