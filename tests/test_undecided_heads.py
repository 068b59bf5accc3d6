"""A head saved beside the embedding it was tied to: only the values tell whether training parted them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_adapter, make_base, weights
from safetensors.torch import load_file, save_file

from fossil_export import merge, plan_merge, verify
from fossil_export.adapters import Adapter
from fossil_export.checkpoints.folder import LocalFolder
from fossil_export.cli import main

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
    settled = plan.settled()
    assert settled.undecided == (None,) and HEAD not in {tensor.name for tensor in settled.tensors}
    result = merge(adapter, tmp_path / "merged")
    assert HEAD not in weights(tmp_path / "merged") and result.plan.undecided == (None,)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert verify(tmp_path / "merged", level="weights").parity


def test_parted_ones_are_stored_apart(tied: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", tied, 0.25)
    assert plan_merge(adapter).settled().files == plan_merge(adapter).files
    merge(adapter, tmp_path / "merged")
    found = weights(tmp_path / "merged")
    assert (found[HEAD] != found[EMBEDDING]).sum() == 1
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify(tmp_path / "merged", level="weights").parity


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
        plan.settled()
