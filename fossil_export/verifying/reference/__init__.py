"""The mathematics a second time, on its own: float64, by index, from the paper's formulas, one file a method.

Nothing here is shared with `methods/`: what merged the weights must not be what checks them. Formulas and
names of the variants: arXiv 2409.15371 and FOSSIL's entry in PEFT (peft/tuners/miss/layer.py).
"""

from __future__ import annotations

from fossil_export.verifying.reference import _bat as bat
from fossil_export.verifying.reference import _dora_mlx as dora_mlx
from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference import _lora_bias as lora_bias
from fossil_export.verifying.reference import _lora_embedding as lora_embedding
from fossil_export.verifying.reference import _lora_mlx as lora_mlx
from fossil_export.verifying.reference import _lora_pruned as lora_pruned
from fossil_export.verifying.reference import _mini as mini
from fossil_export.verifying.reference import _sbora as sbora
from fossil_export.verifying.reference import _tile as tile
from fossil_export.verifying.reference._exact import Exact

EXACT: dict[str, Exact] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "sbora": sbora,
    "lora_pruned": lora_pruned,
    "lora": lora,
    "lora_embedding": lora_embedding,
    "lora_bias": lora_bias,
    "dora_mlx": dora_mlx.LINEAR,
    "dora_mlx_embedding": dora_mlx.EMBEDDING,
    "lora_mlx": lora_mlx.LINEAR,
    "lora_mlx_embedding": lora_mlx.EMBEDDING,
}
"""By method. One that is not here cannot be checked: a KeyError, never another one's formula."""

__all__ = ["EXACT", "Exact"]
