"""What the trained tensors mean: one file per method, one entry in `METHODS`.

Each file states its formula once, in its docstring, and implements `Method`. Merging, the unmerged forward pass, LoRA,
GGUF and ONNX forms all come from there.
"""

from __future__ import annotations

from fossil_export.methods import _bat as bat
from fossil_export.methods import _mini as mini
from fossil_export.methods import _tile as tile
from fossil_export.methods._base import Base
from fossil_export.methods._dora_mlx import DoraMlx, DoraMlxEmbedding
from fossil_export.methods._lora import Lora
from fossil_export.methods._lora_bias import LoraBias
from fossil_export.methods._lora_embedding import LoraEmbedding
from fossil_export.methods._lora_mlx import LoraMlx, LoraMlxEmbedding
from fossil_export.methods._lora_pruned import LoraPruned
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import POSITIVE, Arrays, Field, Method, Numbers, Shapes
from fossil_export.methods._sbora import Sbora

METHODS: dict[str, Method] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "sbora": Sbora(),
    "lora_pruned": LoraPruned(),
    "lora": Lora(),
    "lora_embedding": LoraEmbedding(),
    "lora_bias": LoraBias(),
    "dora_mlx": DoraMlx(),
    "dora_mlx_embedding": DoraMlxEmbedding(),
    "lora_mlx": LoraMlx(),
    "lora_mlx_embedding": LoraMlxEmbedding(),
}
"""By the name that records and tables give them. Those that share endings are asked in this order."""

__all__ = ["METHODS", "POSITIVE", "Arrays", "Base", "Field", "LowRank", "Method", "Numbers", "Shapes", "Tiling"]
