"""What changes outputs changes biases too, if there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, make_adapter, make_base
from peft import IA3Config, LoraConfig, RoadConfig
from tuner_tools import assert_live

from fossil_export import inspect, merge
from fossil_export.errors import MergeError


@pytest.mark.parametrize(
    "config",
    [
        {"kind": IA3Config, "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"kind": RoadConfig, "group_size": 8, "target_modules": QV},
    ],
    ids=["ia3", "road"],
)
def test_a_class_that_can_have_biases_and_has_none_is_merged_without(config: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float64)
    merged = assert_live(base, tmp_path, **config)
    assert not [name for name in merged if name.endswith("bias")]
    assert not inspect(tmp_path / "adapter").problems


def test_a_bias_of_lora_beside_none_is_refused_in_words_of_biases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, lora_bias=True, target_modules=QV)
    with pytest.raises(MergeError, match=r"has no .*q_proj\.bias, .*and a merge adds none; .*--base, or run .*PEFT"):
        merge(tmp_path / "adapter", tmp_path / "merged")
