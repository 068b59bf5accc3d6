"""Relatives of LoRA that save folders like PEFT's and compute something else: how they are told, and why they are refused.

| method | how it is told | source |
|---|---|---|
| GOAT | peft_type GOAT, `lora_gating`, `lora_A.0` | goat/peta/src/goat/layer.py (github.com/Facico/GOAT-PEFT) |
| HydraLoRA | peft_type HYDRALORA, `lora_route`, `lora_B.0` | peft/tuners/hydralora/layer.py (github.com/zyy-2001/CoLA) |
| CoLA | peft_type COLA, `num_A`, `num_B`, `lora_A.0` | peft/tuners/cola/layer.py (github.com/zyy-2001/CoLA) |
| ResLoRA | reslora_config.json and pytorch_model_lora.bin, `loras.0.lora_A` | reslora/myloralib (github.com/microsoft/LMOps) |
| BOTTLENECK | peft_type BOTTLENECK, `adapter_down` | peft/src/peft/tuners/bottleneck.py (github.com/Haoxiang03/NEAT) |

SBoRA and LoRAPrune are merged (methods/_sbora.py, methods/_lora_pruned.py).
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable

_TOKENS = "chooses among its experts for each token, so that no weight holds what it computes"
_SERVE = "serve it with the code that trained it"

_TYPES = {
    "GOAT": f"it {_TOKENS}; {_SERVE}",
    "HYDRALORA": f"it {_TOKENS}; {_SERVE}",
    "COLA": "training began from the base less a part of its singular values, which no file has; merge it with CoLA",
    "BOTTLENECK": f"its layers are not linear, so that no weight holds what it computes; {_SERVE}",
}
_KEYS = {
    r"\.(lora_gating|lora_route|lora_router|moe_layer)\b": f"the adapter {_TOKENS}; {_SERVE}",
    r"\.loras\.\d+\.lora_[AB]$": "ResLoRA adds the branches of other layers to a layer's own; merge it with ResLoRA",
    r"\.lora_[AB]\.\d+(\.weight)?$": "a module has several matrices in the place of one (as GOAT, HydraLoRA and CoLA "
    "have), which PEFT's LoRA has not; merge it with the code that trained it",
    r"\.adapter_(down|up)\.": f"an adapter on what layers give, not on weights; {_SERVE}",
}
_RESLORA = {"reslora_config.json", "pytorch_model_lora.bin"}


def why_type(peft_type: object) -> str | None:
    """Why adapters of a `peft_type` that PEFT has not cannot be merged; None for one that is not known."""
    return _TYPES.get(peft_type) if isinstance(peft_type, str) else None


def why_tensor(name: str) -> str | None:
    """Why an adapter with a tensor of this key is not the LoRA that its config says; None if nothing is known."""
    return next((why for pattern, why in _KEYS.items() if re.search(pattern, name)), None)


def why_folder(names: Iterable[str]) -> str | None:
    """The same for a folder with these files, and no adapter_config.json, as the end of a message."""
    if set(names) >= _RESLORA:
        return "; it is ResLoRA's, which adds the branches of other layers to a layer's own: merge it with ResLoRA"
    return None
