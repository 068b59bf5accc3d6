"""ONNX graphs of a masked language model whose tied embedding was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_adapter
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from fossil_export import FossilExportError, export_onnx, merge, verify

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_a_masked_model_answers_as_it_was_trained(tmp_path: Path) -> None:
    """Its graph has logits of every position, but neither it nor its trainer continues a text."""
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=60)).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}
    make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=BertForMaskedLM, r=4, **options)
    export_onnx(tmp_path / "adapter", tmp_path / "onnx", runtime="torch")
    found = verify(tmp_path / "onnx")
    assert found.parity and found.forward is not None and found.forward.continuations == 0


def test_a_model_of_images_is_checked_by_its_tensors(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path / "base")
    options = {"model_class": ViTForImageClassification, "r": 4, "target_modules": ["q_proj"]}
    make_adapter(tmp_path / "adapter", tmp_path / "base", **options)
    merge(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(FossilExportError, match=r"cannot be run.*--level weights"):
        verify(tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").parity
