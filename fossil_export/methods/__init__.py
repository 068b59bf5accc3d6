"""What the trained tensors mean: one file per method, one entry in `METHODS`.

Each file states its formula once, in its docstring, and implements `Method`. Merging, the unmerged forward pass, LoRA,
GGUF and ONNX forms all come from there.
"""

from __future__ import annotations

from fossil_export.methods import _bat as bat
from fossil_export.methods import _mini as mini
from fossil_export.methods import _tile as tile
from fossil_export.methods._adalora import AdaLora
from fossil_export.methods._base import Base
from fossil_export.methods._bdlora import BdLora
from fossil_export.methods._beft import Beft
from fossil_export.methods._boft import Boft
from fossil_export.methods._c3a import C3a
from fossil_export.methods._deft import Deft
from fossil_export.methods._delora import Delora
from fossil_export.methods._dora import Dora, DoraEmbedding
from fossil_export.methods._dora_mlx import DoraMlx, DoraMlxEmbedding
from fossil_export.methods._fourierft import Fourierft
from fossil_export.methods._gralora import Gralora
from fossil_export.methods._hira import Hira, HiraEmbedding
from fossil_export.methods._hra import Hra
from fossil_export.methods._ia3 import Ia3, Ia3Bias
from fossil_export.methods._ln_tuning import LnTuning, LnTuningBias
from fossil_export.methods._loha import Loha
from fossil_export.methods._lokr import Lokr
from fossil_export.methods._lora import Lora
from fossil_export.methods._lora_bias import LoraBias
from fossil_export.methods._lora_embedding import LoraEmbedding
from fossil_export.methods._lora_mlx import LoraMlx, LoraMlxEmbedding
from fossil_export.methods._lora_parameter import LoraParameter
from fossil_export.methods._lora_pruned import LoraPruned
from fossil_export.methods._low_rank import LowRank, Tiling
from fossil_export.methods._method import POSITIVE, Arrays, Field, Method, Numbers, Shapes
from fossil_export.methods._oft import Oft, OftEmbedding
from fossil_export.methods._peanut import Peanut
from fossil_export.methods._pvera import Pvera
from fossil_export.methods._randlora import Randlora
from fossil_export.methods._road import VARIANTS as _ROADS
from fossil_export.methods._road import Road, RoadBias
from fossil_export.methods._sbora import Sbora
from fossil_export.methods._shira import Shira
from fossil_export.methods._starts import Kasa, Olora, Pissa, Started
from fossil_export.methods._supertuning import Supertuning
from fossil_export.methods._tokens import ROWS, LoraTokens, TrainableTokens
from fossil_export.methods._unilora import Unilora
from fossil_export.methods._vblora import Vblora
from fossil_export.methods._vera import Vera

METHODS: dict[str, Method] = {
    "tile": tile,
    "mini": mini,
    "bat": bat,
    "pissa": Pissa(),
    "olora": Olora(),
    "kasa": Kasa(),
    "bdlora": BdLora(),
    "dora": Dora(),
    "dora_embedding": DoraEmbedding(),
    "sbora": Sbora(),
    "lora_pruned": LoraPruned(),
    "lora": Lora(),
    "lora_embedding": LoraEmbedding(),
    "lora_bias": LoraBias(),
    "lora_parameter": LoraParameter(),
    "lora_tokens": LoraTokens(),
    "trainable_tokens": TrainableTokens(),
    "dora_mlx": DoraMlx(),
    "dora_mlx_embedding": DoraMlxEmbedding(),
    "lora_mlx": LoraMlx(),
    "lora_mlx_embedding": LoraMlxEmbedding(),
    "adalora": AdaLora(),
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


def starts_elsewhere(name: str) -> bool:
    """Whether training by the method of this name began from another weight than the base's, made of that as stored."""
    return isinstance(METHODS[name], Started)


__all__ = [
    "METHODS",
    "POSITIVE",
    "ROWS",
    "Arrays",
    "Base",
    "Field",
    "LowRank",
    "Method",
    "Numbers",
    "Shapes",
    "Tiling",
    "starts_elsewhere",
]
