"""Signs that an adapter was trained over quantized weights (QLoRA's way).

On the unquantized base it then is another model than the trained one, and nothing in its tensors says so.
"""

from __future__ import annotations

import re

from fossil_export.adapters._adapter import Adapter
from fossil_export.checkpoints._companions import CARD

_NAMES = re.compile(r"(?i)(?<![a-z0-9])(bnb|[48]-?bits?|int[48]|nf4|fp[48]|mxfp4|nvfp4|gptq|awq|hqq|aqlm)(?![a-z0-9])")
# As in unsloth/…-bnb-4bit, …-GPTQ-Int4, …-AWQ, …-FP8.

_CARD = re.compile(r"quantization config was used during training|load_in_[48]bit: True")
# What PEFT wrote into README.md until it lost sight of the settings (create_or_update_model_card in peft_model.py).


def quantized_training(adapter: Adapter) -> str | None:
    """What says that training ran over quantized weights; None where nothing does, which is no proof that it did not.

    The base's name is looked at, and the adapter's README.md where it is on this machine.
    """
    if adapter.base_model and _NAMES.search(adapter.base_model.rpartition("/")[2]):
        return f"its base is called {adapter.base_model}"
    card = adapter.files[0].parent / CARD
    try:
        text = card.read_text(errors="replace") if card.is_file() else ""
    except OSError:
        return None
    return f"its {CARD} has the settings of a quantized base" if _CARD.search(text) else None
