"""Adapters of PEFT that are refused by name: why, and what can be done with them instead.

Source: `forward` and `get_delta_weight` in peft/tuners/*/{layer,model}.py, and `_get_adapter_state_dict` for what is in
the file.
"""

from __future__ import annotations

from collections.abc import Mapping

_SERVE = "serve it with PEFT beside the model"
_PEFT = "merge it with PEFT (merge_and_unload) where it was trained"

_PROMPT = f"it puts trained vectors before the tokens and changes no weight; {_SERVE}"
_ROUTED = f"its update is mixed anew for each input, so that no weight holds it; {_SERVE}"
_SVD = f"its update is made from a decomposition of the base's weights, which is not in the file; {_PEFT}"
_DRAWN = f"which weights it changes is drawn anew when it is loaded and is not in the file; {_PEFT}"

UNMERGEABLE: Mapping[str, str] = {
    # What is no weight update.
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": f"it puts trained keys and values before those of the tokens and changes no weight; {_SERVE}",
    "CARTRIDGE": f"it is a cache of keys and values and changes no weight; {_SERVE}",
    "ADAPTION_PROMPT": f"it adds attention to trained vectors, with a gate, and changes no weight; {_SERVE}",
    "POLY": _ROUTED,
    "LILY": _ROUTED,
    "XLORA": (
        "it mixes several LoRAs anew for each token, so that no weight holds it; serve it with PEFT, or merge those "
        "LoRAs themselves, with weights of your choice"
    ),
    "SHADOW": f"it is a second network beside the model, whose answer depends on the input; {_SERVE}",
    # Updates of weights that the file does not hold as a whole.
    "ADAMSS": _SVD,
    "FROD": _SVD,
    "OSF": _SVD,
    "PSOFT": _SVD,
    "TINYLORA": (
        f"which of its shared vectors a module has is counted over the whole model and is not in the file; {_PEFT}"
    ),
    "WAVEFT": _DRAWN,
    "GLORA": f"the bias that it makes depends on the weight beside it; {_PEFT}",
}
"""By `peft_type`. One that is neither here nor in `METHODS` is unknown, as a newer PEFT's may be."""
