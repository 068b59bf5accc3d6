"""What the trained tensors mean: one file per method, one entry in `METHODS`.

Each file states its formula once, in its docstring, and implements `Method`. Merging, the unmerged forward pass, LoRA,
GGUF and ONNX forms all come from there.
"""

from __future__ import annotations

from fossil_export.methods import _bat as bat
from fossil_export.methods import _mini as mini
from fossil_export.methods import _tile as tile
from fossil_export.methods._base import Base
from fossil_export.methods._beft import Beft
from fossil_export.methods._c3a import C3a
from fossil_export.methods._deft import Deft
from fossil_export.methods._delora import Delora
from fossil_export.methods._fourierft import Fourierft
from fossil_export.methods._gralora import Gralora
from fossil_export.methods._hira import Hira, HiraEmbedding
from fossil_export.methods._lora import Lora
from fossil_export.methods._lora_bias import LoraBias
from fossil_export.methods._lora_embedding import LoraEmbedding
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import POSITIVE, Arrays, Field, Method, Numbers, Shapes
from fossil_export.methods._peanut import Peanut
from fossil_export.methods._pvera import Pvera
from fossil_export.methods._randlora import Randlora
from fossil_export.methods._shira import Shira
from fossil_export.methods._supertuning import Supertuning
from fossil_export.methods._unilora import Unilora
from fossil_export.methods._vblora import Vblora
from fossil_export.methods._vera import Vera

METHODS: dict[str, Method] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "lora": Lora(),
    "lora_embedding": LoraEmbedding(),
    "lora_bias": LoraBias(),
    "vera": Vera(),
    "peanut": Peanut(),
    "hira": Hira(),
    "hira_embedding": HiraEmbedding(),
    "c3a": C3a(),
    "delora": Delora(),
    "beft": Beft(),
    "pvera": Pvera(),
    "gralora": Gralora(),
    "randlora": Randlora(),
    "deft": Deft(),
    "shira": Shira(),
    "supertuning": Supertuning(),
    "unilora": Unilora(),
    "vblora": Vblora(),
    "fourierft": Fourierft(),
}
"""By the name that records and tables give them. Those that share endings are asked in this order."""

__all__ = ["METHODS", "POSITIVE", "Arrays", "Base", "Field", "LowRank", "Method", "Numbers", "Shapes", "Tiling"]
