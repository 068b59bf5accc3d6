"""The mathematics a second time, on its own: float64, by index, from the paper's formulas, one file a method.

Nothing here is shared with `methods/`: what merged the weights must not be what checks them. Formulas and
names of the variants: arXiv 2409.15371 and FOSSIL's entry in PEFT (peft/tuners/miss/layer.py).
"""

from __future__ import annotations

from fossil_export.verifying.reference import _adalora as adalora
from fossil_export.verifying.reference import _bat as bat
from fossil_export.verifying.reference import _bdlora as bdlora
from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference import _lora_bias as lora_bias
from fossil_export.verifying.reference import _lora_embedding as lora_embedding
from fossil_export.verifying.reference import _mini as mini
from fossil_export.verifying.reference import _tile as tile
from fossil_export.verifying.reference import _tokens as tokens
from fossil_export.verifying.reference._dora import Dora, DoraEmbedding
from fossil_export.verifying.reference._exact import Exact
from fossil_export.verifying.reference._starts import Kasa, Olora, Pissa

EXACT: dict[str, Exact] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "pissa": Pissa(),
    "olora": Olora(),
    "kasa": Kasa(),
    "bdlora": bdlora,
    "dora": Dora(),
    "dora_embedding": DoraEmbedding(),
    "lora": lora,
    "lora_embedding": lora_embedding,
    "lora_bias": lora_bias,
    "lora_parameter": tokens,
    "lora_tokens": tokens,
    "trainable_tokens": tokens,
    "adalora": adalora,
}
"""By method. One that is not here cannot be checked: a KeyError, never another one's formula."""

__all__ = ["EXACT", "Exact"]
