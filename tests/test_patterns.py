"""Patterns of a config of which several match a module: PEFT sorts them when it saves, so that their order is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from tuner_tools import assert_live

from fossil_export import load_adapter, merge
from fossil_export.errors import AdapterError
from fossil_export.methods._lora import matching

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


PARTS = ["layers", "1", "12", "q_proj", "a", ""]
KEYS = st.lists(st.sampled_from([*PARTS, ".", r"\.", r"\\.", "^", ".*", r"\d"]), max_size=7).map("".join)
NAMES = st.lists(st.sampled_from([*PARTS, "xlayers"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(KEYS, max_size=30, unique=True), NAMES)
@example([rf"^layers\.{number}\.a" for number in range(20)], "layers.12.a")
@example([rf"layers.{number}\.a" for number in range(20)], "x.layersx12.a")
def test_of_many_keys_those_match_that_match_in_peft(keys: list[str], name: str) -> None:
    filling = {f"none{number}": -1 for number in range(20)}
    pattern = {**filling, **{key: number for number, key in enumerate(keys)}}
    theirs = {key: number for key, number in pattern.items() if get_pattern_key([key], name) == key}
    found = matching({"rank_pattern": pattern}, "rank_pattern", name, "here")
    assert list(found.items()) == list(theirs.items())


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("count", [1, 40])
def test_a_key_that_is_no_pattern_is_told_with_its_file_and_field(
    field: str, count: int, base: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", base, kind=peft.LoraConfig, target_modules=QV)
    keys = {**{f"none{number}": 1 for number in range(count)}, "(": 1}
    edit_json(tmp_path / "adapter" / "adapter_config.json", **{field: keys})
    with pytest.raises(AdapterError, match=rf"^{tmp_path}.*{field}: '\(' is not a valid regular expression"):
        load_adapter(tmp_path / "adapter")
