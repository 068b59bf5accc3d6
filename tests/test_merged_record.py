"""The record of a merge: what was merged into what, and how much of the update survived."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import make_adapter, make_base, weights

import fossil_export
from fossil_export import merge
from fossil_export.checkpoints._header import read_header


def test_record_says_what_was_merged_into_what(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = merge(adapter, tmp_path / "merged", hash=True)
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert record["tool"] == {"name": "fossil-export", "version": fossil_export.__version__}
    assert (record["adapter"]["variant"], record["adapter"]["rank"]) == ("tile", 8)
    for entry in record["adapter"]["files"]:
        assert entry["sha256"] == sha256((adapter / entry["file"]).read_bytes()).hexdigest()
    for entry in record["base"]["weights"]:
        content = (base / entry["file"]).read_bytes()
        length = len(read_header(base / entry["file"]).encoded)
        assert entry["size"] == len(content) and entry["sha256"] == sha256(content).hexdigest()
        assert entry["header_sha256"] == sha256(content[:length]).hexdigest()
    for entry in record["files"]:
        assert entry["sha256"] == sha256((tmp_path / "merged" / entry["file"]).read_bytes()).hexdigest()
    assert record["base"]["configs"]["config.json"] == sha256((base / "config.json").read_bytes()).hexdigest()
    assert len(record["tensors"]) == len(result.survival) == 14
    assert all(entry["survived"] == pytest.approx(1, abs=1e-3) for entry in record["tensors"])
    merge(adapter, tmp_path / "quick")
    quick = json.loads((tmp_path / "quick" / "fossil_export.json").read_text())
    assert "files" not in quick and "sha256" not in quick["base"]["weights"][0]


def test_hub_cache_gives_revision_and_blobs(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The layout huggingface_hub keeps: snapshots of links to blobs named by their digest."""
    repository = tmp_path / "models--org--base"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    blobs = {}
    for path in base.iterdir():
        blobs[path.name] = sha256(path.read_bytes()).hexdigest()
        path.rename(repository / "blobs" / blobs[path.name])
        (snapshot / path.name).symlink_to(os.path.relpath(repository / "blobs" / blobs[path.name], snapshot))
    result = merge(adapter, tmp_path / "merged", base=snapshot)
    record = json.loads((tmp_path / "merged" / "fossil_export.json").read_text())
    assert result.plan.base_revision == record["base"]["revision"] == "a" * 40
    assert all(entry["hub_blob"] == blobs[entry["file"]] for entry in record["base"]["weights"])
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_swallowed_update_is_measured_and_warned_of(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)

    def tiny(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 1e-5

    make_adapter(tmp_path / "adapter", base, change=tiny)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    # All rows of these small weights are in the sample, so the figures can be had in full.
    for trained in result.plan.adapter.trained.values():
        name = f"{trained.module}.weight"
        update = torch.from_numpy(result.plan.adapter.arrays(trained.module)["D"].copy()).T.double()
        update = update.repeat(1, before[name].shape[1] // 8)
        moved = after[name].double() - before[name].double()
        rows = slice(0, 64) if len(update) <= 64 else slice(None)
        survived = float((moved * update)[rows].sum() / (update * update)[rows].sum())
        assert result.survival[name].survived == pytest.approx(survived, rel=0.2 if len(update) > 64 else 1e-6)
    assert "survived rounding" in result.warnings[0] and "--dtype float32" in result.warnings[0]
    wide = merge(tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    assert not wide.warnings
    assert all(part.survived == pytest.approx(1, abs=1e-2) for part in wide.survival.values())


def test_untrained_adapter_is_called_that(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, change=lambda model: None)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert "not trained" in result.warnings[0]
    assert all(part.survived is None for part in result.survival.values())


def test_a_password_in_the_address_of_a_base_gets_into_no_record_line_or_page(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "https://ada:hunter2@huggingface.co/ada/base?token=hf_hunter2hunter2"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = merge(adapter, tmp_path / "merged", base=base)
    found = fossil_export.inspect(adapter, base=base)
    opened = fossil_export.load_adapter(adapter)
    shown = [
        repr(opened),
        opened._repr_html_(),
        repr(found),
        found._repr_html_(),
        json.dumps(found.to_dict()),
        repr(result),
    ]
    shown += [path.read_text() for path in (tmp_path / "merged").glob("*.json")]
    assert "huggingface.co/ada/base" in "".join(shown) and "hunter2" not in "".join(shown)
