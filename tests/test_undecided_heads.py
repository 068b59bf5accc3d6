"""A head saved beside the embedding it was tied to: only the values tell whether training parted them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, make_adapter, make_base, weights
from huggingface_hub import snapshot_download
from loopback import LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from fossil_export import FossilExportError, merge, merge_to_hub, plan_merge, settled, verify
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.cli import main
from fossil_export.errors import MergeError
from fossil_export.merging import finish, merge_file
from fossil_export.writing._sink import FolderSink

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def saved(folder: Path, base: Path, moved: float) -> Path:
    """An adapter that PEFT saved with both, the head `moved` away from the embedding."""
    live = make_adapter(folder, base, r=4)
    live.save_pretrained(folder, save_embedding_layers=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    embedding = tensors[f"base_model.model.{EMBEDDING}"]
    tensors[f"base_model.model.{HEAD}"] = embedding.clone()
    tensors[f"base_model.model.{HEAD}"][-1, -1] += moved
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", torch.bfloat16, tie=True)


def test_equal_ones_stay_tied(tied: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", tied, 0.0)
    plan = plan_merge(adapter)
    assert plan.undecided == ((EMBEDDING, HEAD),) and plan.to_dict()["undecided"] == [[EMBEDDING, HEAD]]
    decided = settled(plan)
    assert decided.undecided == (None,) and HEAD not in {tensor.name for tensor in decided.tensors}
    result = merge(adapter, tmp_path / "merged")
    assert HEAD not in weights(tmp_path / "merged") and result.plan.undecided == (None,)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert verify(tmp_path / "merged", level="weights").parity


def test_parted_ones_are_stored_apart(tied: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", tied, 0.25)
    assert settled(plan_merge(adapter)).files == plan_merge(adapter).files
    merge(adapter, tmp_path / "merged")
    found = weights(tmp_path / "merged")
    assert (found[HEAD] != found[EMBEDDING]).sum() == 1
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify(tmp_path / "merged", level="weights").parity


@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_files_made_by_hand_want_a_settled_plan(moved: float, tied: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", tied, moved)
    plan, place = plan_merge(adapter), tmp_path / "by-hand"
    place.mkdir()
    told = rf"{HEAD} is stored depends on whether it equals {EMBEDDING}.*use fossil_export.settled\(plan\)"
    with pytest.raises(MergeError, match=told):
        merge_file(plan, plan.files[0], FolderSink(place))
    assert list(place.iterdir()) == []
    plan = settled(plan)
    assert settled(plan) is plan
    results = [merge_file(plan, file, FolderSink(place)) for file in plan.files]
    with pytest.raises(MergeError, match=told):
        finish(plan_merge(adapter), results, FolderSink(place))
    finish(plan, results, FolderSink(place))
    merge(adapter, tmp_path / "merged")
    made, wanted = ({path.name: path.read_bytes() for path in one.iterdir()} for one in (place, tmp_path / "merged"))
    assert made == wanted


def test_settling_fetches_what_it_reads(hub: LoopbackHub, tied: Path, tmp_path: Path) -> None:
    hub.add_folder("ada/tied", tied)
    hub.add_folder("ada/adapter", saved(tmp_path / "adapter", tied, 0.0))
    plan = settled(plan_merge("ada/adapter", "ada/tied"))
    assert plan.undecided == (None,) and HEAD not in {tensor.name for tensor in plan.tensors}


def test_the_plan_reads_no_values(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved(tmp_path / "adapter", tied, 0.0)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(Adapter, "array", refuse)
    monkeypatch.setattr(LocalFolder, "view", refuse)
    plan = plan_merge(adapter)
    shown = CliRunner().invoke(main, ["merge", str(adapter), "--dry-run"]).output
    assert f"undecided    {HEAD} stays tied to {EMBEDDING} if they are equal" in shown
    with pytest.raises(AssertionError, match="values were read"):
        settled(plan)


@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_a_model_that_cannot_be_parted_merges_while_they_are_equal(moved: float, tmp_path: Path) -> None:
    """T5 scales its logits only while head and embedding are tied."""
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    base = tmp_path / "base"
    T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).save_pretrained(base)
    make_adapter(tmp_path / "adapter", base, r=4, target_modules=["q"], model_class=T5ForConditionalGeneration)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    shared = weights(base)["shared.weight"]
    head = shared.clone()
    head[0, 0] += moved
    saved = {"base_model.model.shared.weight": shared, "base_model.model.lm_head.weight": head}
    save_file(load_file(file) | saved, file, {"format": "pt"})
    edit_json(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["lm_head", "shared"])
    plan = plan_merge(tmp_path / "adapter")
    assert plan.undecided == (("shared.weight", "lm_head.weight"),)
    if moved:
        with pytest.raises(FossilExportError, match=r"ties shared.weight and .* whatever its config says"):
            merge(tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    else:
        merge(tmp_path / "adapter", tmp_path / "merged")
        assert "lm_head.weight" not in weights(tmp_path / "merged")


@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_a_streamed_merge_looks_too(moved: float, hub: LoopbackHub, tied: Path, tmp_path: Path) -> None:
    hub.add_folder("ada/tied", tied)
    adapter = saved(tmp_path / "adapter", tied, moved)
    merge(adapter, tmp_path / "here", base="ada/tied")
    merge_to_hub(adapter, "ada/merged", base="ada/tied")
    there = weights(Path(snapshot_download("ada/merged")))
    here = weights(tmp_path / "here")
    assert here.keys() == there.keys() and (HEAD in there) == bool(moved)
    assert all(torch.equal(value, there[name]) for name, value in here.items())


def test_without_a_config_it_is_not_known_what_is_tied(tied: Path, tmp_path: Path) -> None:
    """A lone weights file has no config.json that says what its head is tied to."""
    tensors = weights(tied)
    (tmp_path / "lone").mkdir()
    save_file(tensors, tmp_path / "lone" / "weights.safetensors")
    base = tmp_path / "lone" / "weights.safetensors"
    with pytest.raises(FossilExportError, match=r"lm_head.weight has no counterpart .* folder with its config.json"):
        merge(saved(tmp_path / "equal", tied, 0.0), tmp_path / "merged", base=base)


@pytest.mark.parametrize("row", [None, 0, 3, 7, 63, 118, 119])
def test_they_are_compared_to_the_last_value(
    row: int | None, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows at a time."""
    monkeypatch.setattr("fossil_export.merging._ties._AT_ONCE", 4 * 96 + 5)
    folder = saved(tmp_path / "adapter", tied, 0.0)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if row is not None:
        tensors[f"base_model.model.{HEAD}"][row, -1] += 1
    save_file(tensors, file, {"format": "pt"})
    plan = settled(plan_merge(folder))
    assert (HEAD in {tensor.name for tensor in plan.tensors}) == (row is not None)
