"""Regular expressions of configs: they mean what `re` means, and one that takes for ever ends in one line."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json, make_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from refusal_tools import CONFIG, refused, run

from fossil_export import _patterns
from fossil_export._patterns import PatternError, pattern_of
from fossil_export.checkpoints.quantized._compressed import Compressed
from fossil_export.checkpoints.quantized._format import Stored
from fossil_export.checkpoints.quantized._fp8 import _skipped
from fossil_export.errors import CheckpointError

SLOW = "(.*.?)*y"
PIECES = [
    "a",
    "b",
    ".",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "[ab]",
    r"\.",
    r"\w",
    "^",
    "$",
    "(?:",
    "(?=",
    "(?i)",
    r"\1",
    "é",
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patterns, "SECONDS", 0.5)
    monkeypatch.setattr(_patterns, "_running", [])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text("ab.é", max_size=8), st.booleans())
def test_a_pattern_means_what_re_means(text: str, name: str, elsewhere: bool) -> None:
    _patterns.SECONDS = 30.0
    before, after = ("(.*\\.)?(", ")$") if len(text) % 2 else ("", "")
    try:
        theirs = re.compile(f"{before}{text}{after}")
    except (re.error, OverflowError):
        with pytest.raises(PatternError, match="not a valid regular expression"):
            pattern_of(text, before, after)
        return
    ours = pattern_of(text, before, after)
    ours._choices, ours._repeats = _patterns.STEPS + 1 if elsewhere else 1, 0  # by another process, or by this one
    assert ours.match(name) == (found and found.groups() if (found := theirs.match(name)) else None)
    assert ours.fullmatch(name) == (found and found.groups() if (found := theirs.fullmatch(name)) else None)


@pytest.mark.parametrize(
    "text",
    [
        *(SLOW, "(a+)+$", "(a|a)" * 40 + "y", "a?" * 40 + "a" * 40, r"(a*)*\1y", "a*" * 30 + "y", "(?=(a+)+y)a"),
        *("(?#[)(a+)+$(?#])", "(?x)#[\n(a+)+$#]", "(?ix:#[\n(a+)+$#]\n)"),  # where a bracket is none
    ],
)
def test_a_slow_pattern_is_ended(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(PatternError, match=r"takes more than .* to match"):
        for letter in "ab":
            pattern_of(text).fullmatch("a" * 40 + letter)
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"^(?!.*(?:visual|audio)).*\.(?:q_proj|down_proj)$",
        r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    ],
)
def test_usual_patterns_need_no_process(text: str) -> None:
    for number in range(200):
        pattern_of(text).fullmatch(f"model.layers.{number}.self_attn.q_proj")
    assert not _patterns._running


def test_a_pattern_that_is_used_for_long_is_not_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = _patterns.Pattern(r".*\.q_proj", "", "")
    clock = iter(range(10**9))
    monkeypatch.setattr(_patterns.time, "perf_counter", lambda: next(clock) * 0.0001)
    for number in range(60_000):
        assert pattern.fullmatch(f"model.{number}.q_proj") is not None
    monkeypatch.setattr(_patterns.time, "perf_counter", lambda: next(clock) * 0.1)
    with pytest.raises(PatternError, match="so many names"):
        for number in range(100):
            pattern.fullmatch(f"model.{number}.q_proj")


FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "target_modules": (LoraConfig, {"target_modules": SLOW}),
    "exclude_modules": (LoraConfig, {"exclude_modules": SLOW}),
    "rank_pattern": (LoraConfig, {"rank_pattern": {SLOW: 4}}),
    "alpha_pattern": (LoraConfig, {"alpha_pattern": {SLOW: 4}}),
    "layers_pattern": (LoraConfig, {"layers_pattern": f"{SLOW}.*", "layers_to_transform": [0]}),
    "feedforward_modules": (IA3Config, {"feedforward_modules": SLOW}),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_slow_pattern_of_an_adapter_is_refused(field: str, base: Path, tmp_path: Path) -> None:
    kind, fields = FIELDS[field]
    more = {"feedforward_modules": []} if kind is IA3Config else {}
    make_adapter(tmp_path / "slow", base, kind=kind, target_modules=["q_proj", "down_proj"], **more)
    edit_json(tmp_path / "slow" / CONFIG, **fields)
    refused(run("inspect", tmp_path / "slow"), "takes more than", "repetitions")


def test_slow_patterns_of_a_quantized_base_are_refused() -> None:
    with pytest.raises(PatternError, match="takes more than"):
        Compressed((), (f"re:{SLOW}",)).group_of("model.layers.0.self_attn.q_proj")
    stored = Stored("config.json", {}, {}, {"modules_to_not_convert": [SLOW]}, lambda *_: None)
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert has a pattern that takes more than"):
        _skipped(stored, stored.settings or {})("model.layers.0.self_attn.q_proj")


def test_a_pattern_of_megabytes_is_refused(adapter: Path) -> None:
    edit_json(adapter / CONFIG, target_modules="x" * 1_000_001)
    refused(run("inspect", adapter), "target_modules", "1000001 characters")


def test_without_target_modules_the_training_is_not_known(adapter: Path) -> None:
    """PEFT takes its default for the type of the model then, which leaves out others' tensors in silence."""
    edit_json(adapter / CONFIG, target_modules=None)
    refused(run("inspect", adapter), CONFIG, "target_modules is null", "down_proj")
