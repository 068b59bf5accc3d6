"""What the trained tensors mean: one file per method, one entry in `METHODS`.

Each file states its formula once, in its docstring, and implements `Method`. Merging, the unmerged forward pass, LoRA,
GGUF and ONNX forms all come from there.
"""

from __future__ import annotations

from fossil_export.methods import _bat as bat
from fossil_export.methods import _mini as mini
from fossil_export.methods import _tile as tile
from fossil_export.methods._base import Base
from fossil_export.methods._boft import Boft
from fossil_export.methods._hra import Hra
from fossil_export.methods._ia3 import Ia3, Ia3Bias
from fossil_export.methods._ln_tuning import LnTuning, LnTuningBias
from fossil_export.methods._loha import Loha
from fossil_export.methods._lokr import Lokr
from fossil_export.methods._lora import Lora
from fossil_export.methods._lora_bias import LoraBias
from fossil_export.methods._lora_embedding import LoraEmbedding
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import POSITIVE, Arrays, Field, Method, Numbers, Shapes
from fossil_export.methods._oft import Oft, OftEmbedding
from fossil_export.methods._road import VARIANTS as _ROADS
from fossil_export.methods._road import Road, RoadBias

METHODS: dict[str, Method] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "lora": Lora(),
    "lora_embedding": LoraEmbedding(),
    "lora_bias": LoraBias(),
    "loha": Loha(),
    "lokr": Lokr(),
    "ia3": Ia3(),
    "ia3_bias": Ia3Bias(),
    "oft": Oft(),
    "oft_embedding": OftEmbedding(),
    "boft": Boft(),
    "hra": Hra(),
    "ln_tuning": LnTuning(),
    "ln_tuning_bias": LnTuningBias(),
    **{variant: Road(variant) for variant in _ROADS},
    **{f"{variant}_bias": RoadBias(variant) for variant in _ROADS},
}
"""By the name that records and tables give them. Those that share endings are asked in this order."""

__all__ = ["METHODS", "POSITIVE", "Arrays", "Base", "Field", "LowRank", "Method", "Numbers", "Shapes", "Tiling"]
