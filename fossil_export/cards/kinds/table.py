"""The table of what cards say of kinds: an entry for each of `KINDS` in artifacts/."""

from __future__ import annotations

from fossil_export.cards.kinds import gguf_lora, lora, merged, miss, onnx

CARDS = {
    "merged": merged.CARD,
    "lora": lora.CARD,
    "miss": miss.CARD,
    "gguf-lora": gguf_lora.CARD,
    "onnx": onnx.CARD,
}
