"""Tiny models whose parameters are tied, and whether a merged one is the live one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

IDS = torch.arange(3, 15).reshape(1, -1)


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    config = BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=40,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def agrees(folder: Path, kind: Any, live: Any) -> None:
    """The folder is loaded whole, and answers as the live model does."""
    loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, live(IDS).logits, rtol=1e-4, atol=1e-4)
