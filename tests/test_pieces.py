"""Parts that the whole merge does not reach easily."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fossil_export._console import print_table, readable_bytes
from fossil_export._spellings import parse_size
from fossil_export.merging._config import edited_config
from fossil_export.merging._survival import SAMPLE_ROWS, Survival, group_rows, measure, sample_starts, sampled_share


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GB", 5 * 10**9),
        ("1.5MB", 1_500_000),
        ("2GiB", 2 * 2**30),
        ("100B", 100),
        (7, 7),
        ("3kb", 3000),
        ("0.5 TB", 5 * 10**11),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


def test_nested_configs_and_architectures() -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"vocab_size": 10, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        "torch_dtype": "bfloat16",
    }
    edited = edited_config(config, untie=[("tie_word_embeddings",)], vocab_size=12, torch_dtype="float32")
    assert edited["text_config"] == {"vocab_size": 12, "tie_word_embeddings": False, "torch_dtype": "float32"}
    assert edited["tie_word_embeddings"] is False and "vocab_size" not in edited and edited["torch_dtype"] == "float32"
    assert config["text_config"]["vocab_size"] == 10  # the base's own is left alone
    for name, want in {
        "BertModel": "BertForSequenceClassification",
        "GPT2LMHeadModel": "GPT2ForSequenceClassification",
        "XLMRobertaForMaskedLM": "XLMRobertaForSequenceClassification",
    }.items():
        assert edited_config({"architectures": [name]}, task_type="SEQ_CLS", labels=2) == {
            "architectures": [want],
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        }
    named = {"id2label": {"0": "no", "1": "yes"}}
    assert edited_config(named, task_type="SEQ_CLS", labels=2)["id2label"] == named["id2label"]
    assert edited_config({}, torch_dtype="float16") == {"torch_dtype": "float16"}


@given(st.integers(1, 5000), st.integers(1, 300))
def test_sample_is_spread_and_bounded(out_features: int, unit: int) -> None:
    rows = out_features * unit
    group = group_rows(unit)
    starts = list(sample_starts(rows, group))
    covered = sum(min(group, rows - start) for start in starts)
    assert starts[0] == 0 and starts[-1] < rows and all(start % group == 0 for start in starts)
    assert min(rows, SAMPLE_ROWS) // 2 <= covered <= max(3 * SAMPLE_ROWS, 3 * group)
    assert sampled_share(rows, group) == pytest.approx(covered / rows)


def test_survival_of_a_known_rounding() -> None:
    """0.4 of a step is lost, 0.6 of a step becomes a whole one."""
    step = 2.0**-7  # of bfloat16 in [1, 2)
    before = np.ones((1, 10), np.float32)
    update = np.full((1, 10), 0.4 * step, np.float32)
    update[0, 5:] = 0.6 * step
    after = (before + update).astype(ml_dtypes.bfloat16)
    got = measure(before, update, after)
    assert got.survived == pytest.approx(0.6 / (0.4**2 + 0.6**2))
    assert got.energy == pytest.approx(1 / (0.4**2 + 0.6**2))
    assert Survival().survived is None and Survival().energy is None


def test_tables_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "size"), [("a", "1"), ("longer", "20")])
    assert capsys.readouterr().out.splitlines() == ["name    size", "a          1", "longer    20"]
    assert [readable_bytes(count) for count in (5, 2_000, 3_400_000, 6_430_000_000, 2 * 10**12)] == [
        "5 B",
        "2.0 kB",
        "3.4 MB",
        "6.4 GB",
        "2.00 TB",
    ]
