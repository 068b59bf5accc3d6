"""`merge --stream` of models whose files have other names, and of tied ones that training parted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_adapter
from loopback import LoopbackHub
from stream_tools import card, published
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from fossil_export import merge, merge_to_hub, push

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "parted": (BertForMaskedLM, BertConfig(**SIZES, vocab_size=60), {"modules_to_save": ["word_embeddings"]}),
    "renamed": (
        ViTForImageClassification,
        ViTConfig(**SIZES, image_size=16, patch_size=8),
        {"modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_the_same_as_merge_and_push(what: str, hub: LoopbackHub, tmp_path: Path) -> None:
    kind, config, options = CASES[what]
    kind(config).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    make_adapter(
        tmp_path / "adapter", tmp_path / "base", model_class=kind, r=4, target_modules=["query", "q_proj"], **options
    )
    hub.add_folder("ada/base", tmp_path / "base")
    streamed = merge_to_hub(tmp_path / "adapter", "ada/streamed", base="ada/base", cache_dir=tmp_path / "cache")
    assert any(move.way == "copy" for move in streamed.plan.moves)
    push(merge(tmp_path / "adapter", tmp_path / "merged", base="ada/base").output, "ada/pushed")
    assert published(hub, "ada/streamed") == published(hub, "ada/pushed")
    assert card(hub, "ada/streamed") == card(hub, "ada/pushed")
