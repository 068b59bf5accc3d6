"""Patterns of a config of which several match a module: PEFT sorts them when it saves, so that their order is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import QV, make_adapter, make_base
from tuner_tools import assert_live

from fossil_export import merge
from fossil_export.errors import AdapterError

LAYERS = r"layers\.\d+\..*"  # before q_proj if sorted


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (peft.LoHaConfig, "alpha_pattern"),
        (peft.LoKrConfig, "rank_pattern"),  # whose whole matrices do not tell the rank by which alpha is divided
    ],
)
def test_values_that_nothing_tells_apart_are_refused(kind: Any, field: str, base: Path, tmp_path: Path) -> None:
    more = {field: {"q_proj": 64, LAYERS: 40}}
    make_adapter(tmp_path / "adapter", base, kind=kind, target_modules=QV, **more)
    with pytest.raises(AdapterError, match=r"q_proj.*_pattern has several values for it"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (peft.LoraConfig, {"rank_pattern": {"q_proj": 2, LAYERS: 4}, "alpha_pattern": {"q_proj": 3, ".*q_proj": 3}}),
        (peft.LoHaConfig, {"rank_pattern": {"q_proj": 2, LAYERS: 4}}),
        (peft.C3AConfig, {"block_size": 12, "block_size_pattern": {"q_proj": 6, LAYERS: 4}}),
        (peft.FourierFTConfig, {"n_frequency_pattern": {"q_proj": 20, LAYERS: 30}}),
    ],
)
def test_values_that_the_tensors_tell_are_taken_from_them(kind: Any, more: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float64)
    live = make_adapter(tmp_path / "adapter", base, kind=kind, target_modules=QV, **more)
    if kind in (peft.C3AConfig, peft.FourierFTConfig):  # PEFT transforms in float32
        merge(tmp_path / "adapter", tmp_path / "merged")
    else:
        assert_live(base, tmp_path, live)
