"""The table of what cards say of kinds: an entry for each of `KINDS` in artifacts/."""

from __future__ import annotations

from fossil_export.cards.kinds import _adapter as adapter
from fossil_export.cards.kinds import _gguf_lora as gguf_lora
from fossil_export.cards.kinds import _lora as lora
from fossil_export.cards.kinds import _merged as merged
from fossil_export.cards.kinds import _miss as miss
from fossil_export.cards.kinds import _onnx as onnx

CARDS = {
    "merged": merged.CARD,
    "lora": lora.CARD,
    "miss": miss.CARD,
    "adapter": adapter.CARD,
    "gguf-lora": gguf_lora.CARD,
    "onnx": onnx.CARD,
}
