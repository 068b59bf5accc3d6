"""The mathematics a second time, on its own: float64, by index, from the paper's formulas, one file a method.

Nothing here is shared with `methods/`: what merged the weights must not be what checks them. Formulas and
names of the variants: arXiv 2409.15371 and FOSSIL's entry in PEFT (peft/tuners/miss/layer.py).
"""

from __future__ import annotations

from fossil_export.verifying.reference import _adalora as adalora
from fossil_export.verifying.reference import _bat as bat
from fossil_export.verifying.reference import _bdlora as bdlora
from fossil_export.verifying.reference import _beft as beft
from fossil_export.verifying.reference import _boft as boft
from fossil_export.verifying.reference import _c3a as c3a
from fossil_export.verifying.reference import _deft as deft
from fossil_export.verifying.reference import _delora as delora
from fossil_export.verifying.reference import _dora_mlx as dora_mlx
from fossil_export.verifying.reference import _fourierft as fourierft
from fossil_export.verifying.reference import _gralora as gralora
from fossil_export.verifying.reference import _hira as hira
from fossil_export.verifying.reference import _hra as hra
from fossil_export.verifying.reference import _ia3 as ia3
from fossil_export.verifying.reference import _ln_tuning as ln_tuning
from fossil_export.verifying.reference import _loha as loha
from fossil_export.verifying.reference import _lokr as lokr
from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference import _lora_bias as lora_bias
from fossil_export.verifying.reference import _lora_embedding as lora_embedding
from fossil_export.verifying.reference import _lora_mlx as lora_mlx
from fossil_export.verifying.reference import _lora_pruned as lora_pruned
from fossil_export.verifying.reference import _mini as mini
from fossil_export.verifying.reference import _peanut as peanut
from fossil_export.verifying.reference import _pvera as pvera
from fossil_export.verifying.reference import _randlora as randlora
from fossil_export.verifying.reference import _sbora as sbora
from fossil_export.verifying.reference import _shira as shira
from fossil_export.verifying.reference import _supertuning as supertuning
from fossil_export.verifying.reference import _tile as tile
from fossil_export.verifying.reference import _tokens as tokens
from fossil_export.verifying.reference import _unilora as unilora
from fossil_export.verifying.reference import _vblora as vblora
from fossil_export.verifying.reference import _vera as vera
from fossil_export.verifying.reference._dora import Dora, DoraEmbedding
from fossil_export.verifying.reference._exact import Exact
from fossil_export.verifying.reference._oft import oft, oft_embedding
from fossil_export.verifying.reference._road import road_1, road_2, road_4
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
    "loha": loha,
    "lokr": lokr,
    "ia3": ia3,
    "ia3_bias": ia3,
    "oft": oft,
    "oft_embedding": oft_embedding,
    "boft": boft,
    "hra": hra,
    "ln_tuning": ln_tuning,
    "ln_tuning_bias": ln_tuning,
    "road_1": road_1,
    "road_2": road_2,
    "road_4": road_4,
    "road_1_bias": road_1,
    "road_2_bias": road_2,
    "road_4_bias": road_4,
    "vera": vera,
    "peanut": peanut,
    "hira": hira,
    "hira_embedding": hira.Embedding,
    "c3a": c3a,
    "delora": delora,
    "beft": beft,
    "pvera": pvera,
    "gralora": gralora,
    "randlora": randlora,
    "deft": deft,
    "shira": shira,
    "supertuning": supertuning,
    "unilora": unilora,
    "vblora": vblora,
    "fourierft": fourierft,
    "sbora": sbora,
    "lora_pruned": lora_pruned,
    "dora_mlx": dora_mlx.LINEAR,
    "dora_mlx_embedding": dora_mlx.EMBEDDING,
    "lora_mlx": lora_mlx.LINEAR,
    "lora_mlx_embedding": lora_mlx.EMBEDDING,
}
"""By method. One that is not here cannot be checked: a KeyError, never another one's formula."""

__all__ = ["EXACT", "Exact"]
