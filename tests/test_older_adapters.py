"""Adapters as older versions of PEFT saved them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, weights

import fossil_export
from fossil_export import merge


@pytest.mark.parametrize("saved", [True, False])
def test_pickled_adapter(saved: bool, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["lm_head"]} if saved else {}
    trained = make_adapter(tmp_path / "adapter", base, **options)
    merge(tmp_path / "adapter", tmp_path / "one")
    state = weights(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    merge(tmp_path / "adapter", tmp_path / "two")
    assert trained is not None
    assert all(torch.equal(value, weights(tmp_path / "two")[name]) for name, value in weights(tmp_path / "one").items())
    torch.save({name: value.bfloat16() for name, value in state.items()}, tmp_path / "adapter" / "adapter_model.bin")
    assert fossil_export.inspect(tmp_path / "adapter").to_dict()["dtypes"] == {"bfloat16": 14}


def test_legacy_bone_folders(base: Path, tmp_path: Path) -> None:
    """Keys and config as PEFT 0.14 to 0.18 wrote them; the first release stored bat shards under true, its default."""
    from safetensors.torch import save_file

    for variant, init in (("tile", True), ("bat", "bat"), ("bat", True), ("bat", ...)):
        options: dict[str, Any] = {"init_weights": "bat"} if variant == "bat" else {}
        name = f"{variant}-{'unsaid' if init is ... else init}"
        make_adapter(tmp_path / name, base, **options)
        merge(tmp_path / name, tmp_path / f"{name}-miss")
        state = weights(tmp_path / name)
        save_file(
            {key.replace("miss_block", "bone_block"): value for key, value in state.items()},
            tmp_path / name / "adapter_model.safetensors",
        )
        edit_json(
            tmp_path / name / "adapter_config.json",
            peft_type="BONE",
            init_weights=init,
            mini_r=...,
            miss_dropout=...,
            peft_version=...,
        )
        result = merge(tmp_path / name, tmp_path / f"{name}-bone")
        assert result.plan.adapter.variant == variant
        for file in sorted((tmp_path / f"{name}-miss").glob("*.safetensors")):
            assert file.read_bytes() == (tmp_path / f"{name}-bone" / file.name).read_bytes()
